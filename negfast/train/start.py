"""From the options of `negfast train` to a run: started anew, or opened again with what it was started with."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from negfast.config import Config, Model, Sid, Train, load_config, to_toml
from negfast.data.dataset import Dataset, date_of, refuse_data_folder
from negfast.errors import InputError
from negfast.files import atomic_file, check_output
from negfast.model.histories import text_width
from negfast.model.load import build_policy, check_model_folder, save_model_files
from negfast.model.lora import add_adapters, merge_adapters
from negfast.model.verdict import Verdict
from negfast.prepare.build import SemanticIdSettings
from negfast.prepare.samples import SETTINGS, prepare_sample
from negfast.runtime import distributed, sharding
from negfast.runtime.checkpoint import load_weights, save_checkpoint
from negfast.runtime.engine import Engine, build_engine, feature_width
from negfast.runtime.machine import use_threads
from negfast.runtime.run_folder import FORMAT, RunFolder
from negfast.train.combinations import check_combinations
from negfast.train.journal import check_tensorboard

EXECUTION = ("device", "threads", "accumulate", "token_budget", "prefetch", "checkpoint_every", "tensorboard")


@dataclass(frozen=True)
class TrainOptions:
    """What `negfast train` and `negfast profile` are asked for, as on the command line."""

    config: Path | None = None  # a TOML file
    preset: str | None = None
    data: Path | None = None  # an embedded sample by default
    model: Path | None = None
    init: Path | None = None  # a finished run, for its weights
    out: Path | None = None
    overrides: tuple[str, ...] = ()
    sample: str | None = None  # which, of `negfast.prepare.samples.SETTINGS`; MovieTweetings by default


def settings_of(options: TrainOptions) -> tuple[RunFolder, Config]:
    """Which run with which settings: an existing run's own where neither file nor preset is named. InputError on bad
    ones."""
    out = options.out
    if options.config is None and options.preset is None and out and RunFolder(out).exists:
        run = RunFolder(out)
        settings = load_config(run.path / "config.toml", None, options.overrides)
    else:
        preset = options.preset or ("quickstart" if options.config is None else None)
        of_sample = SETTINGS[options.sample] if options.sample else ()
        settings = load_config(options.config, preset, (*of_sample, *options.overrides))
        name = options.config.stem if options.config is not None else options.sample or str(preset)
        run = RunFolder(out or Path("runs") / name)
    _refuse_unused(options)
    check_combinations(settings)
    check_tensorboard(settings.train.tensorboard)
    check_output(run.path / "config.toml")
    refuse_data_folder(run.path)
    return run, settings


def _refuse_unused(options: TrainOptions) -> None:
    """InputError where an option makes --sample, or a setting that --set names, meaningless."""
    if options.data is not None and options.sample is not None:
        raise InputError(f"--sample {options.sample}: has no place beside --data {options.data}")
    rules = (
        ("--model", options.model, "model.", "brings its own shape"),
        ("--init", options.init, "model.", "brings its own shape"),
        ("--data", options.data, "sample.", "is prepared already"),
    )
    for option, given, prefix, why in rules:
        for override in options.overrides if given is not None else ():
            key = override.partition("=")[0].strip()
            if key.startswith(prefix) and key != "model.lora_rank":
                raise InputError(f"--set {key}: does nothing beside {option} {given}, which {why}")


def open_run(run: RunFolder, settings: Config, options: TrainOptions, device: torch.device) -> Engine:
    """The run's engine with the weights before the first step; starts the run if it is new.

    Raises InputError where the run was started with other settings, data or model, or its data set has changed since.
    """
    use_threads(settings.train.threads)
    if distributed.from_first(lambda: {"new": not run.exists})["new"]:
        distributed.first_does(lambda: _start(run, settings, options))
    if run.read()["init"] is not None:
        settings = _with_shape(settings, run.config.model)
    dataset = _check_same(run, settings, options)
    policy, tokenizer = run.load_policy(dataset)
    until = None if run.refit is None else run.refit.until
    counts = dataset.manifest["counts"]
    with timed(f"trie and community prior of {counts['events']:,} events, {counts['items']:,} items"):
        engine = build_engine(settings, dataset, policy, tokenizer, device, until)
    load_weights(run.initial, engine.policy)
    if sharding.shard(engine.policy, settings, device):
        say(f"layers' weights are sharded over {distributed.size()} ranks")
    return engine


def say(line: str) -> None:
    """A line on stderr, from the first rank alone."""
    if distributed.rank() == 0:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Says on stderr how long ``what`` took."""
    began = time.perf_counter()
    yield
    say(f"{what}: {time.perf_counter() - began:.1f} s")


def _start(run: RunFolder, settings: Config, options: TrainOptions) -> None:
    """Writes what a run is made of; run.json comes last and makes it a run."""
    if options.model is not None:
        check_model_folder(options.model)
    data_dir = options.data if options.data is not None else run.path / "data"
    if options.data is None and not data_dir.exists():
        sample = options.sample or "movietweetings"
        say(f"preparing the embedded sample {sample}")
        semantic_ids = SemanticIdSettings(quantizer=settings.sid.quantizer, encoder=settings.sample.encoder)
        prepare_sample(sample, data_dir, semantic_ids, report=say)
    dataset = Dataset.open(data_dir)
    _check_quantizer(dataset, settings.sid.quantizer, options.data is None)
    torch.manual_seed(settings.train.seed)
    shape = dataset.codes.shape[1], int(dataset.manifest["semantic_ids"]["codebook"])
    verdict_features = feature_width(dataset)
    if options.init is None:
        texts = [text for text in dataset.items.text if text.strip()]
        widths = verdict_features, text_width(dataset, settings.history)
        policy, tokenizer = build_policy(settings.model, options.model, texts, *shape, *widths)
    else:
        source = RunFolder(options.init)
        _check_init(source, dataset, options.model, verdict_features, settings.history.text)
        settings = _with_shape(settings, source.config.model)
        policy, tokenizer = source.load_policy(dataset)
        load_weights(source.final, policy)
        merge_adapters(policy)
        policy.verdict = Verdict(verdict_features)  # fitted anew: another fit of a fitted one overfits
    add_adapters(policy, settings.model)
    run.path.mkdir(parents=True, exist_ok=True)
    save_model_files(policy, tokenizer, run.model)
    save_checkpoint(run.initial, policy)
    with atomic_file(run.path / "config.toml") as temporary:
        temporary.write_text(to_toml(settings))
    description = {
        "format": FORMAT,
        "data": os.path.relpath(data_dir.resolve(), run.path.resolve()),
        "fingerprint": dataset.fingerprint,
        "model": None if options.model is None else str(options.model),
        "init": None if options.init is None else str(options.init),
        "verdict_features": verdict_features,
        "learned_until": date_of(dataset.valid_day),
    }
    with atomic_file(run.description) as temporary:
        temporary.write_text(json.dumps(description, indent=1) + "\n")


def _with_shape(settings: Config, model: Model) -> Config:
    """``settings`` with the shape of the ``model`` that --init brought, whatever was asked for; adapters are new."""
    return replace(settings, model=replace(model, lora_rank=settings.model.lora_rank))


def _check_quantizer(dataset: Dataset, wanted: str, embedded: bool) -> None:
    """InputError where a setting asks for other semantic IDs than the data set has; of a given one the default asks
    nothing."""
    found = dataset.manifest["semantic_ids"]["quantizer"]
    if wanted != found and (embedded or wanted != Sid().quantizer):
        raise InputError(f"sid.quantizer: found {wanted}, but {dataset.path} was prepared with {found}")


def _check_init(source: RunFolder, dataset: Dataset, model: Path | None, verdict_features: int, text: bool) -> None:
    """InputError where a run cannot start from the weights of ``source``."""
    source.require_finished()
    source.check_data(dataset)
    if model is not None:
        raise InputError(f"--model {model}: has no place beside --init {source.path}, which brings its model")
    if source.read()["verdict_features"] != verdict_features:
        found = f"{source.read()['verdict_features']} features of users and items"
        raise InputError(f"--init {source.path}: was trained with {found}, expected the {verdict_features} of the data")
    if (found_text := source.config.history.text) != text:
        found, expected = (str(value).lower() for value in (found_text, text))
        raise InputError(f"--init {source.path}: was trained with history.text={found}, expected {expected}")
    if source.learned_until > dataset.valid_day:
        until, start = date_of(source.learned_until), date_of(dataset.valid_day)
        raise InputError(f"--init {source.path}: learned from events before {until}, expected none from {start} on")


def _with_execution(started: Train, now: Train) -> Train:
    """The settings of a run, but those that cannot change its result as they are now."""
    return replace(started, **{name: getattr(now, name) for name in EXECUTION})


def _check_same(run: RunFolder, settings: Config, options: TrainOptions) -> Dataset:
    """The data set of a run that is resumed; InputError where it was started otherwise, or the data set has changed."""
    description = run.read()
    started_as = run.config  # read, not as text: a setting that came later has its default in an older run
    if replace(started_as, train=_with_execution(started_as.train, settings.train)) != settings:
        raise InputError(f"{run.path}: was started with other settings than asked for; see its config.toml, or --out")
    for name, given in (("model", options.model), ("init", options.init)):
        if given is not None and str(given) != description[name]:
            raise InputError(f"{run.path}: was started with --{name} {description[name]}, found {given}")
    if options.data is not None and options.data.resolve() != run.data.resolve():
        raise InputError(f"{run.path}: was started with --data {run.data}, found {options.data}")
    dataset = Dataset.open(run.data)
    if dataset.fingerprint != description["fingerprint"]:
        raise InputError(f"{dataset.path}: has changed since {run.path} was started on it; choose another --out")
    return dataset
