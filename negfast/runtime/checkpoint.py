"""Checkpoints: weights and optimiser state as safetensors, the rest as JSON; written beside, fsynced, renamed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from negfast.data.dataset import file_record, verify_files
from negfast.errors import InputError, TrainingError
from negfast.files import atomic_directory
from negfast.runtime import distributed
from negfast.runtime.sharding import is_sharded, like, local, whole
from negfast.spans import span

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


def check_checkpoint(folder: Path, again: bool = True) -> None:
    """InputError where a file of a checkpoint is missing or not what was written, by `verify_files`."""
    files: Any = read_state(folder).get("files")
    try:
        verify_files(folder, files, STATE, again)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{folder / STATE}: damaged: found files {files!r}") from error


def load_weights(folder: Path, policy: nn.Module) -> None:
    """Loads a checkpoint's weights into ``policy``; InputError where they are missing, damaged or do not fit."""
    check_checkpoint(folder, again=False)
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


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json says. InputError where it is missing or damaged."""
    return read_object(folder / STATE)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. InputError where there is none."""
    try:
        read = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: found no such file, expected one of a run") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    if not isinstance(read, dict):
        raise InputError(f"{path}: damaged: found no JSON object")
    return read


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The undamaged checkpoint of ``folder`` that is furthest along, by (stage number, step) in its name; None without
    any. ``warn`` is called with a line for each damaged one."""
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
