"""`negfast train`: a run directory from nothing to its table, or on from where it stopped."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from negfast.errors import InputError
from negfast.evaluate.eval import evaluate_folder, write_report
from negfast.evaluate.predictions import calibrate, calibrate_shown
from negfast.evaluate.sets import check_choosable, valid_set
from negfast.files import locked
from negfast.kernels import VOCABULARY, implementations
from negfast.model.fused_layers import stock_because
from negfast.runtime import distributed, sharding
from negfast.runtime.checkpoint import (
    latest_checkpoint,
    load_weights,
    read_state,
    remove_unfinished,
    save_by_first,
)
from negfast.runtime.engine import Engine
from negfast.runtime.machine import choose_device
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.verdict import fit_verdict
from negfast.train import faults
from negfast.train.align import AlignStage
from negfast.train.combinations import check_combinations
from negfast.train.grpo.stage import GrpoStage
from negfast.train.journal import Journal
from negfast.train.loop import StopRequested, run_stage
from negfast.train.refit import start_refit
from negfast.train.sft import SCALES, SftStage
from negfast.train.start import TrainOptions, open_run, say, settings_of, timed
from negfast.train.step import Stage
from negfast.train.validation import Validation

STAGES: dict[str, Callable[[Engine], Stage]] = {"align": AlignStage, "sft": SftStage, "grpo": GrpoStage}


def train(options: TrainOptions, table: bool = True) -> RunFolder:
    """Runs all stages and leaves RUN, which is returned, with its table; an unfinished RUN is resumed from its last
    checkpoint.

    Without data the embedded MovieTweetings is prepared into RUN/data. Without ``table`` the test split is left alone,
    as is right while settings are compared. Raises InputError on bad settings or on a RUN that was started with
    others, TrainingError where training fails.
    """
    run, settings = settings_of(options)
    device = distributed.local_device(choose_device(settings.train.device))
    with distributed.group(device), _only_writer(run):
        _run_stages(run, open_run(run, settings, options, device))
        first = distributed.rank() == 0
    if first and table:
        _show_table(run)
    return run


def refit(source: RunFolder, out: Path | None, whole_log: bool = False, table: bool = True) -> RunFolder:
    """Trains the finished run ``source`` again, with all that it chose on valid, on everything before T_test; with
    ``whole_log`` up to the log's end, for production: no later events are left to evaluate it on, so there is no table.

    ``out`` is RUN-refit beside it by default. Raises InputError where ``source`` is unfinished or ``out`` another run.
    """
    source.require_finished()
    run, settings = RunFolder(out or source.path.with_name(f"{source.path.name}-refit")), source.config
    check_combinations(settings)  # with as many ranks as there are now
    device = distributed.local_device(choose_device(settings.train.device))
    with distributed.group(device), _only_writer(run):
        distributed.first_does(lambda: start_refit(run, source, list(STAGES), whole_log, say))
        _run_stages(run, open_run(run, settings, TrainOptions(), device))
        first = distributed.rank() == 0
    if first and whole_log:
        say(f"{run.path}: learned from the whole log; no later events are left to measure it on")
    elif first and table:
        _show_table(run)
    return run


@contextmanager
def _only_writer(run: RunFolder) -> Iterator[None]:
    """Rank 0 holds the lock on the run, on behalf of all."""
    with ExitStack() as held:
        distributed.first_does(lambda: held.enter_context(locked(run.path)))
        yield


def open_stage(name: str, options: TrainOptions) -> tuple[RunFolder, Engine, Stage]:
    """The run that `train` would start or resume, and one stage of it, ready for its first step.

    It has the weights of the latest stage before it that is finished. InputError on an unknown stage.
    """
    check_stage(name)
    run, settings = settings_of(options)
    with locked(run.path):  # it may be started here
        engine = open_run(run, settings, options, choose_device(settings.train.device))
    before = list(STAGES)[: list(STAGES).index(name)]
    _load_latest(run, engine, [stage for stage in before if (run.checkpoints / stage).is_dir()])
    return run, engine, STAGES[name](engine)


def check_stage(name: str) -> None:
    """InputError where no stage has this name."""
    if name not in STAGES:
        raise InputError(f"--stage {name!r}: expected one of {', '.join(STAGES)}")


def replay(folder: Path) -> None:
    """Runs a step again that was not finite, from what it left in RUN/failed/, and prints where numbers go wrong."""
    path, name = faults.read_failed(folder)
    run = RunFolder(path)
    run.read()  # raises where there is none, which `open_stage` would start
    _, engine, stage = open_stage(name, TrainOptions(out=run.path))
    load_weights(folder, engine.policy)
    print("\n".join(faults.replay(folder, stage, engine.policy)))


def _load_latest(run: RunFolder, engine: Engine, done: list[str]) -> None:
    """The weights of the last of the stages ``done``; where none is, those of before the first step stay."""
    if done:
        load_weights(run.checkpoints / done[-1], engine.policy)


def _show_table(run: RunFolder) -> None:
    if not run.report.exists():
        with locked(run.path):
            write_report(run, *evaluate_folder(run, "test", None))
    print(run.report.read_text())


def _run_stages(run: RunFolder, engine: Engine) -> None:
    names, refit = list(STAGES), run.refit
    done = [name for name in names if (run.checkpoints / name).is_dir()]
    distributed.first_does(lambda: remove_unfinished(run.checkpoints))
    resume = latest_checkpoint(run.checkpoints, warn=say)
    if resume is not None and read_state(resume)["stage"] in done:
        resume = None
    if len(done) == len(names) and run.final.is_dir():
        return
    steps = {name: getattr(engine.config, name).steps if refit is None else refit.stages[name].step for name in names}
    resumed_from = None
    if resume is not None:
        resumed_from = {key: read_state(resume)[key] for key in ("stage", "step")}
    elif done:
        resumed_from = {"stage": done[-1], "step": steps[done[-1]]}
    journal = Journal(run.path, steps, resumed_from, engine.config.train.tensorboard)
    if resumed_from is not None:
        say(f"resuming from {resumed_from['stage']} step {resumed_from['step']}")
    _tell_implementations(engine, journal)
    _load_latest(run, engine, done)
    validations: dict[str, Validation] = {}
    every = {"sft": engine.config.sft.validate_every, "grpo": engine.config.grpo.validate_every}
    if refit is None:
        with timed("requests and the sample of valid"):
            valid = valid_set(engine)
            check_choosable(valid)
            validations = {"sft": Validation(engine, valid, SCALES), "grpo": Validation(engine, valid, by_reward=True)}
    for number, name in enumerate(names):
        if name in done:
            continue
        with sharding.gathered(engine.policy), timed(f"what {name} learns from"):
            stage = STAGES[name](engine)
        say(f"stage {number + 1} of {len(names)}: {name}, {steps[name]} steps")
        try:
            run_stage(
                stage,
                number,
                engine.policy,
                run.path,
                engine.config.train,
                journal,
                resume,
                validations.get(name),
                every.get(name, 0),
                None if refit is None else refit.stages[name],
            )
        except StopRequested as stopped:
            say(f"{stopped}; `negfast train --out {run.path}` resumes")
            sys.exit(130)
        resume = None
    _finish(run, engine)
    journal.event("finished")


def _finish(run: RunFolder, engine: Engine) -> None:
    """The final weights: those of the last stage, and the verdict, which is fitted now since no stage reads it."""
    state = distributed.from_first(lambda: _fit_filter(run, engine))
    save_by_first(run.final, engine.policy, state)


def _fit_filter(run: RunFolder, engine: Engine) -> dict[str, Any]:
    """Fits the verdict; what the final state says of P(dislike | feedback) and, where the log tells it,
    P(dislike | shown)."""
    began = time.perf_counter()
    fitted, there = fit_verdict(engine)
    say(f"verdict: fitted on {fitted:,} of {there:,} judgements, {time.perf_counter() - began:.1f} s")
    if run.refit is not None:
        feedback, shown = run.refit.calibration, run.refit.shown
    else:
        with timed("calibration on valid"):
            feedback, shown = calibrate(engine, valid_set(engine)), calibrate_shown(engine)
    return {"calibration": vars(feedback), "shown_calibration": None if shown is None else vars(shown)}


def _tell_implementations(engine: Engine, journal: Journal) -> None:
    """Which code computes each part of the steps, on the terminal and in events.jsonl."""
    config = engine.policy.decoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = implementations(engine.device, head_dim)
    reason = stock_because(engine.policy, engine.device)
    found["norm_rope_mlp"] = found[VOCABULARY] if reason is None else f"stock transformers ({reason})"
    journal.event("implementations", device=str(engine.device), **found)
    parts: dict[str, list[str]] = {}
    for part, implementation in found.items():
        parts.setdefault(implementation, []).append(part)
    for implementation, names in parts.items():
        say(f"{implementation} on {engine.device}: {', '.join(names)}")
