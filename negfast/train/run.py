"""`negfast train`: a run directory from nothing to its table, or on from where it stopped."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from negfast.config import Config, Model, Sid, Train, load_config, to_toml
from negfast.data.dataset import Dataset, date_of, refuse_data_folder
from negfast.errors import InputError
from negfast.evaluate.eval import evaluate_folder, write_report
from negfast.evaluate.policy_predictions import calibrate, calibrate_shown
from negfast.evaluate.sets import check_choosable, evaluation_set
from negfast.files import atomic_file, check_output, locked
from negfast.kernels import FULL_VOCABULARY, implementations
from negfast.model.fused_layers import stock_because
from negfast.model.load import build_policy, check_model_folder, save_model_files
from negfast.model.lora import add_adapters, merge_adapters
from negfast.model.verdict_prior import VerdictPrior
from negfast.prepare.build import SemanticIdSettings
from negfast.prepare.samples import prepare_movietweetings
from negfast.runtime import distributed, sharding
from negfast.runtime.checkpoint import (
    latest_checkpoint,
    load_weights,
    read_state,
    remove_unfinished,
    save_by_first,
    save_checkpoint,
)
from negfast.runtime.engine import Engine, build_engine, choose_device, history_features, mass_weights, use_threads
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.verdict import Calibration, fit_prior
from negfast.train import faults
from negfast.train.align import AlignStage
from negfast.train.grpo.stage import GrpoStage, check_combinations
from negfast.train.journal import Journal, check_tensorboard
from negfast.train.loop import StopRequested, run_stage
from negfast.train.refit import start_refit
from negfast.train.sft import SCALES, SftStage
from negfast.train.step import Stage
from negfast.train.validation import Validation

STAGES: dict[str, Callable[[Engine], Stage]] = {"align": AlignStage, "sft": SftStage, "grpo": GrpoStage}


def train(
    config: Path | None,
    preset: str | None,
    data: Path | None,
    model: Path | None,
    init: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
    table: bool = True,
    refit: Path | None = None,
) -> None:
    """Runs all stages and leaves RUN with its table; an unfinished RUN is continued from its last checkpoint.

    Without ``data`` the embedded MovieTweetings is prepared into RUN/data. Without ``table`` the test split is left
    alone, as is right while settings are compared. ``refit`` is a finished run to train again on everything before
    T_test, from the same first weights and with all that was chosen on valid; ``out`` is the only other option then
    (default: RUN-refit beside it). Raises InputError on bad settings or on a RUN that was started with others,
    TrainingError where training cannot go on.
    """
    if refit is None:
        run, settings = asked_for(config, preset, out, overrides)
    else:
        source = RunFolder(refit.resolve())
        source.require_finished()
        run, settings = RunFolder(out or source.path.with_name(f"{source.path.name}-refit")), source.config
        check_combinations(settings)  # with as many ranks as there are now
    device = distributed.local_device(choose_device(settings.train.device))
    with distributed.group(device), _only_writer(run):
        if refit is not None:
            distributed.first_does(lambda: start_refit(run, source, list(STAGES), _say))
        engine = _open_run(run, settings, data, model, init, device)
        _run_stages(run, engine)
        first = distributed.rank() == 0
    if not first or not table:
        return
    if not run.report.exists():
        with locked(run.path):
            write_report(run, *evaluate_folder(run, "test", None))
    print(run.report.read_text())


@contextmanager
def _only_writer(run: RunFolder) -> Iterator[None]:
    """Rank 0 holds the lock on the run, on behalf of all."""
    with ExitStack() as held:
        distributed.first_does(lambda: held.enter_context(locked(run.path)))
        yield


def open_stage(
    name: str,
    config: Path | None,
    preset: str | None,
    data: Path | None,
    model: Path | None,
    init: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
) -> tuple[RunFolder, Engine, Stage]:
    """The run that `train` would start or go on with, and one stage of it, ready for its first step.

    It has the weights of the latest stage before it that is finished. InputError on an unknown stage.
    """
    check_stage(name)
    run, settings = asked_for(config, preset, out, overrides)
    engine = _open_run(run, settings, data, model, init, choose_device(settings.train.device))
    before = list(STAGES)[: list(STAGES).index(name)]
    _load_start(run, engine, [stage for stage in before if (run.checkpoints / stage).is_dir()])
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
    _, engine, stage = open_stage(name, None, None, None, None, None, run.path, ())
    load_weights(folder, engine.policy)
    print("\n".join(faults.replay(folder, stage, engine.policy)))


def asked_for(
    config: Path | None, preset: str | None, out: Path | None, overrides: tuple[str, ...]
) -> tuple[RunFolder, Config]:
    """Which run with which settings; without any given, the settings of an existing RUN."""
    if config is None and preset is None and not overrides and out is not None and RunFolder(out).exists:
        run = RunFolder(out)
        settings = run.config  # nothing is asked for but to go on
    else:
        preset = preset or ("quickstart" if config is None else None)
        settings = load_config(config, preset, overrides)
        run = RunFolder(out or Path("runs") / (config.stem if config is not None else str(preset)))
    check_combinations(settings)
    check_tensorboard(settings.train.tensorboard)
    check_output(run.path / "x")
    refuse_data_folder(run.path)
    return run, settings


def _open_run(
    run: RunFolder, settings: Config, data: Path | None, model: Path | None, init: Path | None, device: torch.device
) -> Engine:
    """The run's engine with the weights before the first step; starts the run if it is new."""
    use_threads(settings.train.threads)
    if distributed.from_first(lambda: {"new": not run.exists})["new"]:
        distributed.first_does(lambda: _start_run(run, settings, data, model, init))
    if run.read()["init"] is not None:
        settings = _with_shape(settings, run.config.model)
    dataset = Dataset.open(_check_same_run(run, settings, data, model, init))
    policy, tokenizer = run.load_policy(dataset)
    until = None if run.refit is None else run.refit.until
    engine = build_engine(settings, dataset, policy, tokenizer, device, run.mass_weights, until)
    load_weights(run.initial, engine.policy)
    if sharding.shard(engine.policy, settings, device):
        _say(f"layers' weights are sharded over {distributed.size()} ranks")
    return engine


def _load_start(run: RunFolder, engine: Engine, done: list[str]) -> None:
    """The weights that the stage after those ``done`` starts from."""
    if done:
        load_weights(run.checkpoints / done[-1], engine.policy)
    else:  # also from another run's weights: the log has grown since
        fit_prior(engine)


def _start_run(run: RunFolder, settings: Config, data: Path | None, model: Path | None, init: Path | None) -> None:
    """Writes what a run is made of; run.json comes last and makes it a run."""
    if model is not None:
        check_model_folder(model)
    data_dir = data if data is not None else run.path / "data"
    if data is None and not data_dir.exists():
        _say("preparing the embedded MovieTweetings-100K")
        semantic_ids = SemanticIdSettings(quantizer=settings.sid.quantizer, encoder=settings.sample.encoder)
        prepare_movietweetings(data_dir, semantic_ids=semantic_ids, report=_say)
    dataset = Dataset.open(data_dir)
    _check_quantizer(dataset, settings.sid.quantizer, data is None)
    torch.manual_seed(settings.train.seed)
    shape = dataset.codes.shape[1], int(dataset.manifest["semantic_ids"]["codebook"])
    verdict_features = history_features(dataset, dataset.valid_day).width
    if init is None:
        texts = [text for text in dataset.items.text if text.strip()]
        policy, tokenizer = build_policy(
            settings.model, model, texts, *shape, verdict_features, settings.prompt.day_gaps
        )
    else:
        source = RunFolder(init)
        _check_init(source, dataset, model, verdict_features, settings.prompt.day_gaps)
        settings = _with_shape(settings, source.config.model)
        policy, tokenizer = source.load_policy(dataset)
        load_weights(source.final, policy)
        merge_adapters(policy)
        policy.verdict_prior = VerdictPrior(verdict_features)  # fitted anew: another fit of a fitted one overfits
    add_adapters(policy, settings.model)
    run.path.mkdir(parents=True, exist_ok=True)
    save_model_files(policy, tokenizer, run.model)
    save_checkpoint(run.initial, policy)
    with atomic_file(run.path / "config.toml") as temporary:
        temporary.write_text(to_toml(settings))
    description = {
        "data": os.path.relpath(data_dir.resolve(), run.path.resolve()),
        "semantic_ids": run.fingerprint(dataset),
        "model": None if model is None else str(model),
        "init": None if init is None else str(init),
        "verdict_features": verdict_features,
        "mass_weights": mass_weights(settings.prior, dataset, dataset.valid_day).to_json(),
        "learned_until": date_of(dataset.valid_day),
    }
    with atomic_file(run.description) as temporary:
        temporary.write_text(json.dumps(description, indent=1) + "\n")


def _with_shape(settings: Config, model: Model) -> Config:
    """``settings`` with the shape of the ``model`` that --init brought, whatever was asked for; adapters are new."""
    adapters = {"lora_rank": settings.model.lora_rank, "lora_alpha": settings.model.lora_alpha}
    return replace(settings, model=replace(model, **adapters))


def _check_quantizer(dataset: Dataset, wanted: str, embedded: bool) -> None:
    """InputError where a setting asks for other semantic IDs than the data set has; of a given one the default asks
    nothing."""
    found = dataset.manifest["semantic_ids"]["quantizer"]
    if wanted != found and (embedded or wanted != Sid().quantizer):
        raise InputError(f"sid.quantizer: found {wanted}, but {dataset.path} was prepared with {found}")


def _check_init(source: RunFolder, dataset: Dataset, model: Path | None, verdict_features: int, day_gaps: bool) -> None:
    """InputError where a run cannot start from the weights of ``source``."""
    source.require_finished()
    source.check_data(dataset)
    if model is not None:
        raise InputError(f"--model {model}: has no place beside --init {source.path}, which brings its model")
    if source.read()["verdict_features"] != verdict_features:
        found = f"{source.read()['verdict_features']} features of users and items"
        raise InputError(f"--init {source.path}: was trained with {found}, expected the {verdict_features} of the data")
    if source.learned_until > dataset.valid_day:
        until, start = date_of(source.learned_until), date_of(dataset.valid_day)
        raise InputError(f"--init {source.path}: learned from events before {until}, expected none from {start} on")
    if source.config.prompt.day_gaps != day_gaps:
        found = "true" if day_gaps else "false"
        raise InputError(f"prompt.day_gaps: found {found}, but --init {source.path} was trained otherwise")


def _with_ways(started: Train, now: Train) -> Train:
    """The settings of a run, but the ways to its result, on which nothing else depends, as they are now."""
    ways = ("device", "threads", "accumulate", "token_budget", "prefetch", "checkpoint_every", "keep", "tensorboard")
    return replace(started, **{way: getattr(now, way) for way in ways})


def _check_same_run(run: RunFolder, settings: Config, data: Path | None, model: Path | None, init: Path | None) -> Path:
    """The data directory of a run that goes on; InputError where it was started otherwise."""
    description = run.read()
    started_as = run.config  # read, not as text: a setting that came later has its default in an older run
    if replace(started_as, train=_with_ways(started_as.train, settings.train)) != settings:
        raise InputError(f"{run.path}: was started with other settings than asked for; see its config.toml, or --out")
    for name, given in (("model", model), ("init", init)):
        if given is not None and str(given) != description[name]:
            raise InputError(f"{run.path}: was started with --{name} {description[name]}, found {given}")
    started_with = run.data
    if data is not None and data.resolve() != started_with.resolve():
        raise InputError(f"{run.path}: was started with --data {started_with}, found {data}")
    run.check_data(Dataset.open(started_with))
    return started_with


def _run_stages(run: RunFolder, engine: Engine) -> None:
    names, refit = list(STAGES), run.refit
    done = [name for name in names if (run.checkpoints / name).is_dir()]
    distributed.first_does(lambda: remove_unfinished(run.checkpoints))
    resume = latest_checkpoint(run.checkpoints, warn=_say)
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
        _say(f"going on from {resumed_from['stage']} step {resumed_from['step']}")
    _tell_implementations(engine, journal)
    _load_start(run, engine, done)
    validations: dict[str, Validation] = {}
    every = {"sft": engine.config.sft.validate_every, "grpo": engine.config.grpo.validate_every}
    if refit is None:
        valid = evaluation_set(engine.log, engine.split, "valid")
        check_choosable(valid)
        validations = {"sft": Validation(engine, valid, SCALES), "grpo": Validation(engine, valid, by_reward=True)}
    for number, name in enumerate(names):
        if name in done:
            continue
        with sharding.gathered(engine.policy):
            stage = STAGES[name](engine)
        _say(f"stage {number + 1} of {len(names)}: {name}, {steps[name]} steps")
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
            _say(f"{stopped}; `negfast train --out {run.path}` goes on")
            sys.exit(130)
        resume = None
    _finish(run, engine)
    journal.event("finished")


def _finish(run: RunFolder, engine: Engine) -> None:
    if run.refit is None:
        valid = evaluation_set(engine.log, engine.split, "valid")
        with sharding.gathered(engine.policy):
            state = distributed.from_first(lambda: _calibrations(calibrate(engine, valid), calibrate_shown(engine)))
    else:
        state = _calibrations(run.refit.calibration(list(STAGES)[-1]), run.refit.shown)
    save_by_first(run.final, engine.policy, state)


def _calibrations(feedback: Calibration, shown: Calibration | None) -> dict[str, Any]:
    """What the final state says of P(dislike | feedback) and, where the log tells it, P(dislike | shown)."""
    return {"calibration": vars(feedback), "shown_calibration": None if shown is None else vars(shown)}


def _tell_implementations(engine: Engine, journal: Journal) -> None:
    """Which code computes each part of the steps, on the terminal and in events.jsonl."""
    config = engine.policy.decoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = implementations(engine.device, head_dim)
    reason = stock_because(engine.policy, engine.device)
    found["norm_rope_mlp"] = found[FULL_VOCABULARY] if reason is None else f"stock transformers ({reason})"
    journal.event("implementations", device=str(engine.device), **found)
    parts: dict[str, list[str]] = {}
    for part, implementation in found.items():
        parts.setdefault(implementation, []).append(part)
    for implementation, names in parts.items():
        _say(f"{implementation} on {engine.device}: {', '.join(names)}")


def _say(line: str) -> None:
    if distributed.rank() == 0:
        print(line, file=sys.stderr, flush=True)
