"""What a stage keeps while it trains: checkpoints to resume from, the best weights on valid, and its last ones."""

import math
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from negfast.runtime import distributed
from negfast.runtime.checkpoint import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    prune_checkpoints,
    read_state,
    save_by_first,
    snapshot,
    unique_tensors,
    write_parts,
)
from negfast.runtime.sharding import gathered
from negfast.train.journal import Journal

KEPT = 2  # checkpoints within a stage


class StageCheckpoints:
    """What a stage keeps: its last ``KEPT`` checkpoints, its best weights on valid, and its final weights.

    Only rank 0 writes; every rank reads the same results.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        stage: str,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        journal: Journal,
        background: bool,
    ) -> None:
        """``background`` writes checkpoints in a thread while training goes on: worth it where the CPU is idle."""
        self.folder, self.number, self.stage = folder, number, stage
        self.policy, self.optimizer, self.journal = policy, optimizer, journal
        self.best = folder / f"best-{stage}"
        self.best_score, self.best_step = -math.inf, 0
        self.background, self.writer = background, ThreadPoolExecutor(1, thread_name_prefix="negfast-checkpoint")
        self.pending: Future[None] | None = None

    def resume(self, path: Path) -> int:
        """Loads weights and optimiser; the step to resume from."""
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
            prune_checkpoints(self.folder, KEPT)
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
