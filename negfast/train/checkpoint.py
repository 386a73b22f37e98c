"""Checkpoints: weights and optimiser state as safetensors, the rest as JSON; written beside, fsynced, renamed."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from negfast.data.dataset import file_record
from negfast.errors import InputError, TrainingError
from negfast.files import atomic_directory
from negfast.spans import span
from negfast.train import distributed
from negfast.train.sharding import gathered, is_sharded, like, local, whole

if TYPE_CHECKING:
    from negfast.train.journal import Journal

WEIGHTS, OPTIMIZER, STATE = "policy.safetensors", "optimizer.safetensors", "state.json"
BATCH = "batch.safetensors"  # of a failed step


def save_checkpoint(folder: Path, policy: nn.Module, state: dict | None = None) -> None:
    """Writes ``folder`` whole or not at all, with the checksums of its files in state.json.

    TrainingError where the disk is full; ``folder`` is what it was then.
    """
    write_parts(folder, {WEIGHTS: unique_tensors(policy)}, state or {})


def save_by_first(folder: Path, policy: nn.Module, state: dict, batch: dict[str, torch.Tensor] | None = None) -> None:
    """`save_checkpoint` for all ranks to call, since each may hold a part of the weights: rank 0 writes, ``batch``
    beside them."""
    parts = {WEIGHTS: unique_tensors(policy)}
    if batch is not None:
        parts[BATCH] = batch
    distributed.first_does(lambda: write_parts(folder, parts, state))


def write_parts(folder: Path, parts: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
    """Files of tensors, and ``state`` with their checksums, as `save_checkpoint` promises."""
    with span("checkpoint"), atomic_directory(folder) as temporary:
        try:
            for name, tensors in parts.items():
                save_file(tensors, temporary / name)
            files = {name: file_record(temporary / name) for name in parts}
            (temporary / STATE).write_text(json.dumps({**state, "files": files}, indent=1) + "\n")
        except (SafetensorError, OSError) as error:  # the library's error for a full disk is none of OSError's
            raise TrainingError(f"{folder}: cannot be written: {error}; what was there before is good") from error


def snapshot(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in this machine's memory that later steps do not change.

    From CUDA they go to pinned memory, all in flight at once: some 50 GB/s, after which only the disk is slow.
    """
    copies = {
        name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def check_checkpoint(folder: Path) -> None:
    """InputError where a file of a checkpoint is missing or not what was written."""
    try:
        files = read_state(folder)["files"]
        for name, record in files.items():
            if file_record(folder / name) != record:
                raise InputError(f"{folder / name}: damaged: its checksum is not the one in {STATE}")
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{folder}: damaged: {error}") from error


def load_weights(folder: Path, policy: nn.Module) -> None:
    """Loads a checkpoint's weights into ``policy``; InputError where they are missing, damaged or do not fit."""
    tensors = _read(folder / WEIGHTS)
    wanted = unique_parts(policy)
    for name, tensor in wanted.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise InputError(f"{folder / WEIGHTS}: {name}: found {found}, expected shape {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            local(tensor).copy_(local(like(tensors[name], tensor)))


def load_optimizer(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimiser's moments and step counts of a checkpoint, each to where its parameter lies."""
    tensors = _read(folder / OPTIMIZER)
    for name, parameter in policy.named_parameters():
        entry = {
            key.rpartition("|")[2]: like(value, parameter)
            for key, value in tensors.items()
            if key.rpartition("|")[0] == name
        }
        if entry:
            optimizer.state[parameter] = entry


def read_state(folder: Path) -> dict:
    return json.loads((folder / STATE).read_text())


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The undamaged checkpoint of ``folder`` that is furthest along, by (stage number, step) in its name; None without
    any. ``warn`` is told of damaged ones."""
    for path in reversed(step_checkpoints(folder)):
        try:
            check_checkpoint(path)
            return path
        except InputError as error:
            warn(f"{error}; going back to the checkpoint before")
    return None


def remove_unfinished(folder: Path) -> None:
    """Removes what processes left of checkpoints that were killed while they wrote or replaced one."""
    for pattern in (".*.tmp", ".*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the ``keep`` checkpoints that are furthest along."""
    for path in step_checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def step_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints within stages, named NUMBER-STAGE-STEP, in the order of training."""
    found = [p for p in folder.iterdir() if p.is_dir() and p.name[0].isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda p: tuple(int(part) for part in p.name.split("-")[::2]))


class StageCheckpoints:
    """What a stage keeps: its last ``keep`` checkpoints, its best weights on valid, and at its end those to go on with.

    Rank 0 writes; on the others nothing is written and every question has the same answer.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        stage: str,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep: int,
        journal: "Journal",
        background: bool,
    ) -> None:
        """``background`` writes checkpoints in a thread while training goes on: worth it where the CPU is idle."""
        self.folder, self.number, self.stage, self.keep = folder, number, stage, keep
        self.policy, self.optimizer, self.journal = policy, optimizer, journal
        self.best = folder / f"best-{stage}"
        self.best_score, self.best_step = -math.inf, 0
        self.background, self.writer = background, ThreadPoolExecutor(1, thread_name_prefix="negfast-checkpoint")
        self.pending: Future[None] | None = None

    def resume(self, path: Path) -> int:
        """Loads weights and optimiser; the step to go on from."""
        load_weights(path, self.policy)
        load_optimizer(path, self.policy, self.optimizer)
        if (self.best / STATE).is_file():  # they may be newer than the checkpoint: score and weights belong together
            best = read_state(self.best)
            self.best_score, self.best_step = best["score"], best["step"]
        return read_state(path)["step"]

    def save(self, step: int, wait: bool) -> None:
        """A checkpoint after ``step`` steps, in the background unless asked to ``wait``; the next call raises what went
        wrong there."""
        distributed.first_does(self.wait)
        parts = {WEIGHTS: unique_tensors(self.policy), OPTIMIZER: optimizer_tensors(self.policy, self.optimizer)}
        distributed.first_does(lambda: self._submit(step, parts))
        if wait or not self.background:
            distributed.first_does(self.wait)

    def wait(self) -> None:
        """Until the checkpoint that is being written is there."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        """Waits for what is being written, whatever ended the stage; says nothing of how that went."""
        if self.pending is not None:
            self.pending.exception()
        self.writer.shutdown()

    def _submit(self, step: int, parts: dict[str, dict[str, torch.Tensor]]) -> None:
        state = {"stage": self.stage, "step": step}
        if self.background:
            parts = {name: snapshot(tensors) for name, tensors in parts.items()}

        def write() -> None:
            write_parts(self.folder / f"{self.number}-{self.stage}-{step:06d}", parts, state)
            prune_checkpoints(self.folder, self.keep)
            self.journal.event("checkpoint", stage=self.stage, step=step)

        self.pending = self.writer.submit(write)

    def consider(self, step: int, validate: Callable[[], dict[str, float]]) -> str:
        """Validates on rank 0 and keeps the weights if they are the best so far; says what was found."""
        self.policy.eval()
        with gathered(self.policy):
            metrics = distributed.from_first(validate)
        self.journal.event("valid", stage=self.stage, step=step, **metrics)
        if metrics["score"] > self.best_score:
            self.best_score, self.best_step = metrics["score"], step
            save_by_first(self.best, self.policy, {"stage": self.stage, "step": step, **metrics})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        return f"{self.stage}: valid at step {step}: {shown}"

    def finish(self, steps: int, chosen: bool) -> None:
        """Leaves the stage's weights in checkpoints/STAGE: the ``chosen`` best on valid, or the last."""
        distributed.first_does(self.wait)
        step = steps
        if chosen:
            load_weights(self.best, self.policy)
            step = self.best_step
            self.journal.event("chosen", stage=self.stage, step=step, score=self.best_score)
            if distributed.rank() == 0:
                print(f"{self.stage}: kept the weights of step {step}, the best on valid", file=sys.stderr, flush=True)
        save_by_first(self.folder / self.stage, self.policy, {"stage": self.stage, "step": step})


def unique_tensors(policy: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without second names of tied tensors, contiguous. Where it is sharded all ranks ask, and rank 0
    gets the whole in this machine's memory."""
    return {name: _whole(tensor) for name, tensor in unique_parts(policy).items()}


def unique_parts(policy: nn.Module) -> dict[str, torch.Tensor]:
    """The same in the policy's own memory, a sharded tensor as its parts."""
    seen, tensors = set(), {}
    for name, tensor in policy.state_dict().items():
        place = name if is_sharded(tensor) else tensor.data_ptr()  # what is tied is never sharded
        if place not in seen:
            seen.add(place)
            tensors[name] = tensor
    return tensors


def optimizer_tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": _whole(value)
        for name, parameter in policy.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if not is_sharded(tensor):
        return tensor.contiguous()
    full = whole(tensor)  # one at a time: together they need not fit
    return full.cpu() if distributed.rank() == 0 else full.new_empty(0)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: found nothing, expected a checkpoint file") from error
    except SafetensorError as error:
        raise InputError(f"{path}: damaged: {error}") from error
