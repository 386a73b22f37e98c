"""When a step fails: what is saved and reported, and how to replay it."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from negfast.errors import InputError, TrainingError
from negfast.model.policy import Policy
from negfast.runtime import distributed, sharding
from negfast.runtime.checkpoint import BATCH, read_state, save_by_first
from negfast.train.reader import read_step
from negfast.train.step import Figures, MicroBatch, Stage

FOLDER = "failed"  # of a run, where failed steps are kept
CPU_OUT_OF_MEMORY = re.compile(r"(?:not enough memory|can't allocate memory): you tried to allocate (\d+) bytes")
SIZES = {  # what a stage's batch is made of, the setting to lower where its micro-batches cannot be made smaller
    "align": ("titles", "sid_titles", "attributes", "pairs"),
    "sft": ("histories",),
    "grpo": ("histories", "group"),
}


class NotFinite(Exception):
    """A loss or gradient norm is NaN or infinite."""

    def __init__(self, figures: Figures) -> None:
        super().__init__(f"found loss {figures.loss:.4g} and gradient norm {figures.grad_norm:.4g}")


def require_finite(figures: Figures) -> None:
    """Raises NotFinite unless loss and gradient norm are finite numbers."""
    if not (math.isfinite(figures.loss) and math.isfinite(figures.grad_norm)):
        raise NotFinite(figures)


@contextmanager
def explained(
    stage: Stage, step: int, policy: Policy, micro_batches: list[MicroBatch], budget: int, run_dir: Path
) -> Iterator[list[int]]:
    """Turns what may go wrong in a step into a TrainingError of one line; a step that is not finite is saved first.

    Gives a list for the tokens of each part of the step, once they are known.
    """
    parts: list[int] = []
    try:
        yield parts
    except NotFinite as error:
        where = run_dir / FOLDER / f"{stage.name}-{step + 1:06d}"
        save_failed(where, stage, step, policy, micro_batches, budget)
        raise TrainingError(
            f"{stage.name} step {step + 1}: {error}, expected finite numbers; nothing was updated. "
            f"The batch is in {where}: `negfast train --replay {where}` looks for the cause"
        ) from None
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # sharded weights are gathered equally often on every rank, so batches are split equally there
        accumulate = len(micro_batches) if sharding.sharded_layers(policy) else None
        advice = memory_advice(error, stage, parts, accumulate)
        if advice is None:
            raise
        raise TrainingError(f"{stage.name} step {step + 1}: {advice}") from error


def memory_advice(error: BaseException, stage: Stage, parts: list[int], accumulate: int | None = None) -> str | None:
    """Which setting to change, and to what, so that the step fits; None if ``error`` is not about memory.

    ``accumulate``: in how many parts every rank splits its batch, where that is how batches are to be split.

    Memory above that of weights and optimiser grows with the tokens of the largest of this rank's ``parts`` of a step.
    Where it is known what was asked for and what was there, they shrink until the whole would have fitted, else to
    half.
    """
    asked = CPU_OUT_OF_MEMORY.search(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        found, factor = _cuda_shortage(str(error))
    elif isinstance(error, MemoryError) or asked:
        found, factor = (f"{int(asked[1]) / 2**30:.1f} GiB more" if asked else "more") + " than this machine has", 2
    else:
        return None
    sizes = {name: size for name in SIZES[stage.name] if (size := getattr(stage.config, name))}  # 0: switched off
    most = min(size for name, size in sizes.items() if name != "group") // distributed.size()
    if parts and len(parts) * factor <= most and stage.config.can_be_split:
        if accumulate is not None:
            return (
                f"out of memory: asked for {found}; set train.accumulate={accumulate * factor} (now {accumulate}): the "
                "same result from smaller parts"
            )
        return (
            f"out of memory: asked for {found}; set train.token_budget={max(parts) // factor} (now a part has "
            f"{max(parts)} tokens): the same result from smaller parts"
        )
    smaller = " or ".join(f"{stage.name}.{name}={max(size // 2, 1)} (now {size})" for name, size in sizes.items())
    return f"out of memory: asked for {found}; set {smaller}"


def _cuda_shortage(message: str) -> tuple[str, int]:
    """What PyTorch asked for, in words, and by what factor a micro-batch has to shrink."""
    units = {"MiB": 2**20, "GiB": 2**30, "KiB": 2**10, "bytes": 1}

    def size(pattern: str) -> float | None:
        match = re.search(pattern + r" ([\d.]+) (MiB|GiB|KiB|bytes)", message)
        return float(match[1]) * units[match[2]] if match else None

    asked, total, used = size("Tried to allocate"), size("total capacity of"), size("this process has")
    if asked is None:
        return "more than the GPU has", 2
    if total is None or used is None:
        return f"{asked / 2**30:.1f} GiB more than the GPU has", 2
    factor = 2 ** max(1, math.ceil(math.log2((used + asked) / total)))
    return f"{asked / 2**30:.1f} GiB more, with {used / 2**30:.1f} of {total / 2**30:.1f} GiB in use", factor


def save_failed(
    folder: Path, stage: Stage, step: int, policy: Policy, micro_batches: list[MicroBatch], budget: int
) -> None:
    """Writes a step that was not finite: the weights it began with, its number, and the batch it read.

    ``batch.safetensors`` holds what went through the policy, call by call, in the order of this rank's micro-batches.
    """
    state = {
        "stage": stage.name,
        "step": step,
        "micro_batches": micro_batches[0].count,
        "token_budget": budget,
        "not_finite": [n for n, p in policy.named_parameters() if p.grad is not None and not finite(p.grad)],
    }
    with Recorder(policy) as recorder, sharding.gathered(policy), torch.no_grad():
        for batch in read_step(stage, step, micro_batches, budget):
            stage.step(batch)
    save_by_first(folder, policy, state, batch=recorder.tensors)


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are; of a sharded tensor, those of this rank."""
    return bool(sharding.local(tensor).isfinite().all())


class Recorder:
    """Keeps what goes through the policy's decoder, and where a number first is not finite."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.first = policy, ""
        self.tensors: dict[str, Tensor] = {}
        self.calls = 0

    def __enter__(self) -> "Recorder":
        embed = self.policy.embed

        def noted(tokens: Tensor, *rest: Any) -> Tensor:
            prefix = f"call{self.calls}."
            second = prefix + "tokens" in self.tensors  # after the histories' come those that branch off
            self.tensors[prefix + ("branch_tokens" if second else "tokens")] = tokens.clone()
            return embed(tokens, *rest)

        self.policy.embed = noted  # type: ignore[method-assign,assignment]
        self.hooks = [self.policy.decoder.register_forward_pre_hook(self._note, with_kwargs=True)]
        for name, module in self.policy.named_modules():
            if name:
                self.hooks.append(module.register_forward_hook(self._check(name)))
        return self

    def __exit__(self, *_: object) -> None:
        del self.policy.embed  # the class's own is back
        for hook in self.hooks:
            hook.remove()

    def _note(self, _: nn.Module, __: tuple, inputs: dict) -> None:
        """Beside a call's token ids: their positions [N] and the histories' lengths [B]."""
        prefix = f"call{self.calls}."
        self.tensors[prefix + "positions"] = inputs["position_ids"][0].clone()
        self.tensors[prefix + "history_lengths"] = inputs["layout"].lengths.clone()
        self.calls += 1

    def _check(self, name: str) -> Callable[[nn.Module, tuple, object], None]:
        def check(_: nn.Module, __: tuple, output: object) -> None:
            if not self.first and isinstance(output, Tensor) and not output.isfinite().all():
                self.first = f"{name} in call {self.calls - 1}"

        return check


def replay(folder: Path, stage: Stage, policy: Policy) -> list[str]:
    """Runs a saved step again with its weights already in ``policy``; lines that say where numbers go wrong.

    Rollouts that a step reused (grpo.epochs above 1) are sampled anew from the weights of the step.
    """
    state = read_state(folder)
    step, micro_batches = (
        state["step"],
        [MicroBatch(number, state["micro_batches"]) for number in range(state["micro_batches"])],
    )
    budget = state["token_budget"]
    lines = [f"{stage.name} step {step + 1}, {len(micro_batches)} micro-batch{'es' * (len(micro_batches) > 1)}"]
    wrong = [name for name, p in policy.named_parameters() if not finite(p)]
    lines += [f"weights that are not finite: {_some(wrong)}"] if wrong else []
    policy.train()
    for number, batch in enumerate(read_step(stage, step - step % stage.config.round_steps, micro_batches, budget)):
        policy.zero_grad()
        with Recorder(policy) as recorder:
            result = stage.step(batch)
        result.loss.backward()
        bad = [name for name, p in policy.named_parameters() if p.grad is not None and not finite(p.grad)]
        norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
        lines.append(f"part {number}: loss {result.loss.item():.6g}, gradient norm {norm.item():.6g}")
        lines += [f"  first output that is not finite: {recorder.first}"] if recorder.first else []
        lines += [f"  gradients that are not finite: {_some(bad)}"] if bad else []
    return lines


def _some(names: list[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_failed(folder: Path) -> tuple[Path, str]:
    """(the run, the stage's name) of a folder that ``save_failed`` wrote; InputError where it is none."""
    if not (folder / BATCH).is_file() or folder.absolute().parent.name != FOLDER:
        raise InputError(f"--replay {folder}: found no {BATCH}, expected a folder in RUN/{FOLDER}/")
    return folder.absolute().parent.parent, read_state(folder)["stage"]
