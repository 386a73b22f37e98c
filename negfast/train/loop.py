"""The one loop that all stages share: step, clip, update, log, checkpoint, watch the validation metric, resume."""

import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from negfast import spans
from negfast.config import Train
from negfast.model.policy import Policy
from negfast.model.recompute import recompute_layers
from negfast.progress import Progress
from negfast.runtime import distributed, sharding
from negfast.runtime.run_folder import Chosen
from negfast.spans import span
from negfast.train import faults
from negfast.train.journal import Journal
from negfast.train.optimizer import learning_rate, make_optimizer
from negfast.train.reader import read_steps
from negfast.train.speed import Meter
from negfast.train.stage_checkpoints import StageCheckpoints
from negfast.train.step import Batch, Figures, Measured, MicroBatch, Stage, add_up


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
    validate_every: int,
    refit: Chosen | None = None,
) -> None:
    """Runs ``stage`` to its end and leaves its weights in RUN/checkpoints/<stage>.

    ``validate``, asked every ``validate_every`` steps, gives metrics of which "score" chooses the weights that are kept
    (higher is better); None keeps the last. With ``refit`` the stage ends at the step chosen there, on the learning
    rates of all its steps, and leaves the scale chosen there. Raises TrainingError on a loss or gradient that is not
    finite, StopRequested after SIGINT or SIGTERM.
    """
    steps = stage.config.steps if refit is None else refit.step
    if config.recompute:
        recompute_layers(policy)
    optimizer = make_optimizer(policy, stage.config, config)
    background = policy.block.rows.is_cuda
    saved = StageCheckpoints(run_dir / "checkpoints", number, stage.name, policy, optimizer, journal, background)
    start = 0 if resume_from is None else saved.resume(resume_from)
    distributed.share_weights(policy)
    micro_batches, meter, stop = my_micro_batches(config.accumulate), Meter(policy), _StopFlag()
    reader = read_steps(stage, range(start, steps), micro_batches, config, policy.block.rows.device)
    progress = Progress(stage.name, steps, done=start, quiet=distributed.rank() > 0)
    with stop, closing(saved):
        with meter, closing(reader), progress:
            if start == 0 and validate is not None:
                progress.log(saved.consider(0, validate))
            for step in range(start, steps):
                rate = learning_rate(step, stage.config)
                with (
                    meter.step(),
                    faults.explained(stage, step, policy, micro_batches, config.token_budget, run_dir) as parts,
                ):
                    with spans.data():
                        batches = next(reader)
                    parts += [batch.tokens for batch in batches]
                    figures = update(stage, policy, optimizer, rate, config.clip_norm, batches)
                done = step + 1
                journal.step(stage.name, done, figures, rate, meter.figures(figures.tokens))
                progress.update(done, journal.summary())
                last = done == steps
                if validate is not None and (last or done % validate_every == 0):
                    progress.log(saved.consider(done, validate))
                if last:
                    break
                if done % stage.config.round_steps:
                    continue  # within a round: what it reuses is in no checkpoint
                stopping = distributed.any_rank(stop.requested)
                if done % config.checkpoint_every == 0 or stopping:
                    saved.save(done, wait=stopping)
                if stopping:
                    raise StopRequested(f"stopped at {stage.name} step {done}; the checkpoint is written")
        with sharding.gathered(policy):
            outcome = stage.outcome() if steps else {}
        if outcome:
            journal.event("outcome", stage=stage.name, **outcome)
        if refit is not None:
            policy.block.scale.fill_(refit.scale)
        saved.finish(steps, chosen=validate is not None)
        if distributed.any_rank(stop.requested):
            raise StopRequested(f"stopped after {stage.name}, which is finished")


def update(
    stage: Stage,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rate: float,
    clip_norm: float,
    batches: list[Batch],
) -> Figures:
    """One optimiser step over this rank's ``batches``, taken out of the list, and those of all others.

    Raises `faults.NotFinite` with nothing updated: the device looks at loss and norm before it changes a weight.
    """
    policy.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    measured, norm = gradients(stage, policy, batches)
    with span("optimiser"):
        # a norm that is not finite scales nothing: `faults.save_failed` looks at the gradients as they were
        sharding.clip(list(policy.parameters()), clip_norm, norm.nan_to_num(0.0, 0.0, 0.0))
        optimizer.found_inf = measured.not_finite  # type: ignore[attr-defined]  # where 1, fused AdamW leaves all be
        optimizer.step()
    figures = measured.figures()  # the one wait for the device, when all of the step is on its way
    faults.require_finite(figures)
    optimizer.zero_grad(set_to_none=True)
    return figures


def gradients(stage: Stage, policy: Policy, batches: list[Batch]) -> tuple[Measured, torch.Tensor]:
    """The gradient of the whole batch in ``policy``; what the step measured, and the gradient's norm."""
    results = []
    with sharding.gathered(policy), policy.weights_cast_once():
        while batches:  # a batch keeps keys and values with their graph: let go of it before the next one
            sharding.reduce_gradients(policy, now=len(batches) == 1)
            result = stage.step(batches.pop(0))
            with span("backward"):
                result.loss.backward()
            result.loss = result.loss.detach()  # and of its graph
            results.append(result)
    distributed.add_gradients(p for p in policy.parameters() if not sharding.is_sharded(p))
    norm = sharding.gradient_norm([p.grad for p in policy.parameters() if p.grad is not None])
    return add_up(results, norm), norm


def my_micro_batches(accumulate: int) -> list[MicroBatch]:
    """This rank's micro-batches of a batch: ``accumulate`` of them, one after the other."""
    first, count = distributed.rank() * accumulate, distributed.size() * accumulate
    return [MicroBatch(first + number, count) for number in range(accumulate)]


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
