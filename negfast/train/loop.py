"""The one loop that all stages share: step, clip, update, log, checkpoint, watch the validation metric, resume."""

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from negfast.config import Stage as StageSettings
from negfast.config import Train
from negfast.errors import TrainingError
from negfast.model.policy import Policy
from negfast.progress import Progress
from negfast.train.checkpoint import (
    load_optimizer,
    load_weights,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from negfast.train.journal import Journal


@dataclass
class StepResult:
    """What one step of a stage gives the loop."""

    loss: Tensor  # scalar with gradient
    metrics: dict[str, Tensor | float | None]  # detached; written to metrics.jsonl
    tokens: int  # tokens that went through the policy, forward and backward


class Stage(Protocol):
    """One stage of training. ``step(n)`` is a pure function of the weights and n: that is what makes resuming exact."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> StageSettings: ...

    def step(self, step: int) -> StepResult: ...


@dataclass
class Best:
    """The best validation score so far and where its weights lie."""

    score: float = -math.inf
    step: int = 0


class StopRequested(Exception):
    """SIGINT or SIGTERM arrived; the checkpoint is written."""


def run_stage(
    stage: Stage,
    number: int,
    policy: Policy,
    run_dir: Path,
    config: Train,
    journal: Journal,
    resume_from: Path | None,
    validate: Callable[[], dict[str, float]] | None,
) -> None:
    """Runs ``stage`` to its end and leaves its weights in RUN/checkpoints/<stage>.

    ``validate`` gives metrics of which "score" chooses the weights that are kept (higher is better); None keeps the
    last. Raises TrainingError on a loss or gradient that is not finite, StopRequested after SIGINT or SIGTERM.
    """
    checkpoints = run_dir / "checkpoints"
    optimizer = make_optimizer(policy, stage.config)
    best, start = Best(), 0
    if resume_from is not None:
        load_weights(resume_from, policy)
        load_optimizer(resume_from, policy, optimizer)
        state = read_state(resume_from)
        start, best = state["step"], Best(state["best_score"], state["best_step"])

    def checkpoint(step: int) -> None:
        state = {"stage": stage.name, "step": step, "best_score": best.score, "best_step": best.step}
        save_checkpoint(checkpoints / f"{number}-{stage.name}-{step:06d}", policy, optimizer, state)
        prune_checkpoints(checkpoints, config.keep)
        journal.event("checkpoint", stage=stage.name, step=step)

    best_dir = checkpoints / f"best-{stage.name}"
    stop = _StopFlag()
    with stop, Progress(stage.name, stage.config.steps, done=start) as progress:
        if start == 0 and validate is not None:
            _consider(policy, 0, validate, best, best_dir, journal, stage.name, progress)
        for step in range(start, stage.config.steps):
            began = time.perf_counter()
            rate = learning_rate(step, stage.config)
            result, norm = update(stage, step, policy, optimizer, rate)
            done = step + 1
            journal.step(stage.name, done, result, norm, rate, time.perf_counter() - began)
            progress.update(done, journal.summary())
            last = done == stage.config.steps
            if validate is not None and (last or done % stage.config.validate_every == 0):
                _consider(policy, done, validate, best, best_dir, journal, stage.name, progress)
            if last:
                break
            if done % stage.config.round_steps:
                continue  # within a round: what it reuses is in no checkpoint
            stopping = stop.requested
            if done % config.checkpoint_every == 0 or stopping:
                checkpoint(done)
            if stopping:
                raise StopRequested(f"stopped at {stage.name} step {done}; the checkpoint is written")
    if validate is not None:
        load_weights(best_dir, policy)
        journal.event("chosen", stage=stage.name, step=best.step, score=best.score)
        print(f"{stage.name}: kept the weights of step {best.step}, the best on valid", file=sys.stderr, flush=True)
    step = stage.config.steps if validate is None else best.step
    save_checkpoint(checkpoints / stage.name, policy, state={"stage": stage.name, "step": step})


def update(
    stage: Stage, step: int, policy: Policy, optimizer: torch.optim.Optimizer, rate: float
) -> tuple[StepResult, Tensor]:
    """One optimiser step; returns what the stage measured and the gradient norm before clipping."""
    policy.train()
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    result = stage.step(step)
    result.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), stage.config.clip_norm)
    if not torch.isfinite(norm) or not torch.isfinite(result.loss.detach()):
        raise TrainingError(
            f"{stage.name} step {step + 1}: found loss {result.loss.item():.4g} and gradient norm {norm.item():.4g}, "
            "expected finite numbers; nothing was updated, the last checkpoint is good"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result, norm


def make_optimizer(policy: Policy, config: StageSettings) -> torch.optim.AdamW:
    """AdamW; weight decay for the decoder's matrices only, a slower rate for the verdict's prior, which was fitted."""
    decayed = [p for n, p in policy.named_parameters() if p.ndim == 2 and n.startswith("decoder.layers")]
    prior = list(policy.verdict_prior.parameters())
    taken = {id(p) for p in decayed + prior}
    rest = [p for p in policy.parameters() if id(p) not in taken]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "rate_factor": 1.0},
        {"params": rest, "weight_decay": 0.0, "rate_factor": 1.0},
        {"params": prior, "weight_decay": 0.0, "rate_factor": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, config: StageSettings) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def _consider(
    policy: Policy,
    step: int,
    validate: Callable[[], dict[str, float]],
    best: Best,
    best_dir: Path,
    journal: Journal,
    stage: str,
    progress: Progress,
) -> None:
    """Validates, and keeps the weights if they are the best so far."""
    policy.eval()
    metrics = validate()
    journal.event("valid", stage=stage, step=step, **metrics)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    progress.log(f"{stage}: valid at step {step}: {shown}")
    if metrics["score"] > best.score:
        best.score, best.step = metrics["score"], step
        save_checkpoint(best_dir, policy, state={"stage": stage, "step": step, **metrics})


class _StopFlag:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps; a second signal ends at once."""

    requested = False

    def __enter__(self) -> "_StopFlag":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, *_: object) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
