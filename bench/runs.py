"""Runs that benchmarks and experiments train once and reuse."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from negfast.config import Config, load_config, to_toml
from negfast.data.dataset import Dataset
from negfast.errors import InputError
from negfast.files import atomic_directory
from negfast.runtime.checkpoint import load_weights
from negfast.runtime.engine import Engine
from negfast.runtime.machine import choose_device
from negfast.runtime.run_folder import RunFolder
from negfast.train.journal import Journal
from negfast.train.loop import run_stage
from negfast.train.run import STAGES, train
from negfast.train.start import TrainOptions, open_run


def trained(
    out: Path,
    config: Path | None,
    preset: str | None,
    data: Path | None,
    overrides: tuple[str, ...],
    model: Path | None = None,
) -> RunFolder:
    """The finished run ``out`` with these settings; trained, or resumed, where it is not finished yet.

    The test split is left alone. InputError where ``out`` was trained otherwise: with other settings, of another model,
    or on another data set than ``data`` (None: whatever it was).
    """
    run = RunFolder(out)
    if not run.final.is_dir():
        data = None if data is None else data.resolve()  # runs may be links
        train(TrainOptions(config, preset, data, model, None, out, overrides), table=False)
    elif run.config != load_config(config, preset, overrides):
        raise InputError(f"{out}: was trained with other settings than asked for; see its config.toml")
    elif run.read()["model"] != (None if model is None else str(model)):
        raise InputError(f"{out}: was trained with --model {run.read()['model']}, found {model}")
    elif data is not None and Dataset.open(data).fingerprint != Dataset.open(run.data).fingerprint:
        raise InputError(f"{out}: was trained on {run.data}, which is another data set than {data}")
    return run


def trained_stages(
    path: Path,
    data: Path,
    overrides: Sequence[str],
    config: Path | None = None,
    preset: str = "quickstart",
) -> tuple[RunFolder, Engine]:
    """The run with the last weights of SFT and GRPO, each trained where it has not been yet and has steps.

    Nothing else is done: no verdict is fitted, and no weights are chosen on valid.
    """
    run, settings = RunFolder(path), load_config(config, preset, overrides)
    engine = open_run(run, settings, TrainOptions(data=data.resolve()), choose_device(settings.train.device))
    steps = {name: count for name, count in (("sft", settings.sft.steps), ("grpo", settings.grpo.steps)) if count}
    done = [name for name in steps if (run.checkpoints / name).is_dir()]
    if done:
        load_weights(run.checkpoints / done[-1], engine.policy)
    if len(done) < len(steps):
        behind = {"stage": done[-1], "step": steps[done[-1]]} if done else None
        journal = Journal(path, steps, behind, False)
        for number, name in enumerate(steps, 1):
            if name not in done:
                run_stage(STAGES[name](engine), number, engine.policy, path, settings.train, journal, None, None, 1)
    return run, engine


def branch(source: RunFolder, folder: Path, settings: Config, stages: Sequence[str]) -> None:
    """Makes ``folder`` a run with other settings that has the ``stages`` of ``source`` behind it, the first ones.

    Kept predictions are copied too (`bench.predictions`): the settings that differ are those of later stages.
    """
    if folder.exists():
        return
    with atomic_directory(folder) as made:
        shutil.copytree(source.model, made / "model")
        for stage in ("initial", *stages):
            shutil.copytree(source.checkpoints / stage, made / "checkpoints" / stage)
        if (source.path / "predictions").is_dir():
            shutil.copytree(source.path / "predictions", made / "predictions")
        (made / "config.toml").write_text(to_toml(settings))
        description = source.read() | {"data": os.path.relpath(source.data.resolve(), folder.resolve())}
        (made / "run.json").write_text(json.dumps(description, indent=1) + "\n")


def data_of(runs: list[RunFolder]) -> Path | None:
    """The data set of the first run, for the others; None before there is one, which has the embedded one prepared."""
    return runs[0].data if runs else None


def equal_compute(done: RunFolder) -> int:
    """The steps of SFT that take as long as the run's steps of SFT and GRPO, by the median time of each."""
    seconds: dict[str, list[float]] = {"sft": [], "grpo": []}
    for line in (done.path / "speed.jsonl").read_text().splitlines():
        step = json.loads(line)
        if step["stage"] in seconds:
            seconds[step["stage"]].append(step["seconds"])
    if not all(seconds.values()):
        return done.config.sft.steps
    of_grpo = np.median(seconds["grpo"]) / np.median(seconds["sft"])
    return done.config.sft.steps + round(done.config.grpo.steps * of_grpo)
