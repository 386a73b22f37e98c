"""What one step of a stage is: its micro-batch, what it gives, and how micro-batches add up.

A step's batch is the same whatever computes it. Its rows are split into equal micro-batches, one or more for each
rank, and every loss is a sum over a micro-batch's rows divided by the size of the *whole* batch. So gradients of
micro-batches are added, never averaged: accumulating on one device or spreading over eight gives the same gradient.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from negfast.config import Stage as StageSettings
from negfast.errors import InputError
from negfast.runtime import distributed


class Batch(Protocol):
    """What a stage read for one micro-batch of a step, on the device."""

    @property
    def tokens(self) -> int:
        """Tokens that go through the policy at once, forward and backward; where completions are yet to be sampled, at
        most."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Part ``index`` of ``count`` of a step's batch."""

    index: int = 0
    count: int = 1

    def of(self, size: int) -> slice:
        """The rows of a batch of ``size`` that belong to this micro-batch; micro-batches differ by one row at most.

        InputError where there are fewer rows than micro-batches.
        """
        if size < self.count:
            raise InputError(
                f"train: found a batch of {size} rows for {self.count} micro-batches (ranks x train.accumulate, halved "
                "for train.token_budget), expected at least a row for each"
            )
        return slice(size * self.index // self.count, size * (self.index + 1) // self.count)

    def halves(self) -> "tuple[MicroBatch, MicroBatch]":
        """The two micro-batches, of twice as many, that this one's rows fall into."""
        return MicroBatch(2 * self.index, 2 * self.count), MicroBatch(2 * self.index + 1, 2 * self.count)

    def part(self, loss: Tensor) -> "Mean":
        """This micro-batch's part of the batch's ``loss``, as a figure that adds up to it."""
        return Mean(loss.detach(), 1 / self.count)


WHOLE = MicroBatch()


class Mean(NamedTuple):
    """A figure of a micro-batch as a sum and what to divide it by, so that they add up to the figure of the batch."""

    total: Tensor
    weight: Tensor | float = 1.0


@dataclass
class StepResult:
    """What a stage gives for one micro-batch of a step."""

    loss: Tensor  # scalar with gradient; the batch's loss is the sum over micro-batches
    metrics: dict[str, Mean | float | None]  # detached; a number is the same in every micro-batch
    tokens: int  # tokens that went through the policy, forward and backward


@dataclass(frozen=True)
class Figures:
    """What a whole step measured, on the host."""

    loss: float
    grad_norm: float  # before clipping
    metrics: dict[str, float | None]
    tokens: int


class Stage(Protocol):
    """One stage of training.

    What it reads depends on the step's number and the micro-batch alone, and the loss on that and the weights alone. So
    resuming and reading ahead are exact, and ranks and accumulation give the same gradient.
    """

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> StageSettings: ...

    def read(self, step: int, micro_batch: MicroBatch) -> Any:
        """A `Batch`; may be called by a thread while another step computes."""
        ...

    def step(self, batch: Any) -> StepResult:
        """The loss of what ``read`` gave; once for each batch."""
        ...

    def outcome(self) -> dict[str, float]:
        """What to note of the finished stage in events.jsonl beside validation."""
        ...


@dataclass(frozen=True)
class Measured:
    """What a whole step measured, still on the device; the same on all ranks."""

    # float64: loss, tokens, total and weight of each Mean of ``metrics``, gradient norm before clipping
    numbers: Tensor
    metrics: dict[str, Mean | float | None]  # of one micro-batch

    @property
    def not_finite(self) -> Tensor:
        """float32 scalar: 1 where the loss or the gradient norm is NaN or infinite, else 0."""
        return (~(self.numbers[0].isfinite() & self.numbers[-1].isfinite())).float()

    def figures(self) -> Figures:
        """Waits for the device."""
        loss, tokens, *parts, norm = self.numbers.tolist()
        metrics: dict[str, float | None] = {}
        for name, value in self.metrics.items():
            if isinstance(value, Mean):
                total, weight, *parts = parts
                metrics[name] = total / weight if weight else 0.0
            else:
                metrics[name] = value
        return Figures(loss, norm, metrics, round(tokens))


def add_up(results: list[StepResult], norm: Tensor) -> Measured:
    """What the micro-batches of all ranks measured, by one sum."""

    def number(value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().double()
        return torch.full((), value, dtype=torch.float64, device=norm.device)  # filled there: no copy to wait for

    rows = []
    for result in results:
        parts = (part for value in result.metrics.values() if isinstance(value, Mean) for part in value)
        rows.append(torch.stack([number(value) for value in (result.loss, result.tokens, *parts)]))
    sums = distributed.add(torch.stack(rows).sum(0))
    return Measured(torch.cat([sums, norm.detach().double().reshape(1)]), results[0].metrics)
