"""What one step of a stage is: its share of a batch, what it gives, and how the parts of a batch add up.

A step's batch is the same whatever computes it: its rows are split into equal shares, one or more for each rank, and
every loss is a sum over a share's rows divided by the size of the *whole* batch. So gradients of shares are added,
never averaged, and accumulating on one device or spreading over eight gives the big batch's gradient.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from negfast.config import Stage as StageSettings
from negfast.errors import InputError
from negfast.runtime import distributed


class Batch(Protocol):
    """What a stage read for one share of a step, on the device."""

    @property
    def tokens(self) -> int:
        """Tokens that go through the policy at once, forward and backward; at most, where answers are yet to come."""
        ...


@dataclass(frozen=True)
class Share:
    """Part ``index`` of ``count`` of a step's batch."""

    index: int = 0
    count: int = 1

    def of(self, size: int) -> slice:
        """The rows of a batch of ``size`` that belong to this share; shares differ by one row at most.

        InputError where there are fewer rows than shares.
        """
        if size < self.count:
            raise InputError(
                f"train: found a batch of {size} rows for {self.count} shares (ranks x train.accumulate, halved for "
                "train.token_budget), expected at least a row for each"
            )
        return slice(size * self.index // self.count, size * (self.index + 1) // self.count)

    def halves(self) -> "tuple[Share, Share]":
        """The two shares, of twice as many, that this one's rows fall into."""
        return Share(2 * self.index, 2 * self.count), Share(2 * self.index + 1, 2 * self.count)

    def part(self, loss: Tensor) -> "Mean":
        """This share's part of the batch's ``loss``, as a figure that adds up to it."""
        return Mean(loss.detach(), 1 / self.count)


WHOLE = Share()


class Mean(NamedTuple):
    """A figure of a share as a sum and what to divide it by, so that shares add up to the figure of the batch."""

    total: Tensor
    weight: Tensor | float = 1.0


@dataclass
class StepResult:
    """What a stage gives for one share of a step."""

    loss: Tensor  # scalar with gradient; the batch's loss is the sum over shares
    metrics: dict[str, Mean | float | None]  # detached; a number is the same in every share
    tokens: int  # tokens that went through the policy, forward and backward


@dataclass(frozen=True)
class Figures:
    """What a whole step measured, on the host."""

    loss: float
    grad_norm: float  # before clipping
    metrics: dict[str, float | None]
    tokens: int


class Stage(Protocol):
    """One stage of training. What it reads is a pure function of the number of the step and the share of its batch,
    and what it makes of that one of the weights: that is what makes resuming and reading ahead exact, and what makes
    ranks and accumulation give the same gradient."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> StageSettings: ...

    def read(self, step: int, share: Share) -> Any:
        """A `Batch`; may be called by a thread while another step computes."""
        ...

    def step(self, batch: Any) -> StepResult:
        """The loss of what ``read`` gave; once for each batch."""
        ...

    def outcome(self) -> dict[str, float]:
        """What to note of the finished stage in events.jsonl beside validation."""
        ...


def add_up(results: list[StepResult], norm: Tensor) -> Figures:
    """The step's figures from this rank's shares and those of all others, by one sum and one copy to the host."""
    means = [name for name, value in results[0].metrics.items() if isinstance(value, Mean)]
    rows = [
        torch.stack(
            [
                torch.as_tensor(value, device=norm.device).detach().double()
                for value in (result.loss, result.tokens, *(part for name in means for part in result.metrics[name]))  # type: ignore[union-attr]
            ]
        )
        for result in results
    ]
    sums = distributed.add(torch.stack(rows).sum(0))
    loss, tokens, *parts, norm_value = torch.cat([sums, norm.detach().double().reshape(1)]).tolist()
    metrics: dict[str, float | None] = {
        name: value for name, value in results[0].metrics.items() if not isinstance(value, Mean)
    }
    values = {
        name: total / count if count else 0.0 for name, total, count in zip(means, parts[::2], parts[1::2], strict=True)
    }
    ordered = {name: values[name] if name in values else metrics[name] for name in results[0].metrics}
    return Figures(loss, norm_value, ordered, round(tokens))
