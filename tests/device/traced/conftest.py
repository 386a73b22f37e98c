from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest

from negfast.data.dataset import Dataset
from negfast.runtime.engine import Engine, build_engine
from negfast.runtime.run_folder import RunFolder
from negfast.train.loop import my_micro_batches, update
from negfast.train.optimizer import make_optimizer
from negfast.train.reader import read_step
from negfast.train.run import open_stage
from negfast.train.stage_checkpoints import StageCheckpoints
from negfast.train.start import TrainOptions, settings_of
from tests.device.fake_cuda import CUDA, Trace, fake_cuda
from tests.tiny import SETTINGS

KERNEL_HEADS = {"model.head_dim": 32}  # which the attention kernels take


@dataclass
class Job:
    """A run's engine on the device, and what it dispatches."""

    engine: Engine
    trace: Trace


@pytest.fixture
def trace() -> Iterator[Trace]:
    with fake_cuda() as trace:
        yield trace


@pytest.fixture(scope="session")
def started(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run before its first step."""
    out = tmp_path_factory.mktemp("started") / "run"
    overrides = tuple(f"{key}={value}" for key, value in (SETTINGS | KERNEL_HEADS).items())
    run, _, _ = open_stage("align", TrainOptions(preset="smoke", data=tiny_data, out=out, overrides=overrides))
    return run


@pytest.fixture
def open_job(started: RunFolder, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Opens the run on the device with other settings than it was started with."""
    dataset = Dataset.open(started.data)

    with fake_cuda() as trace:

        def opened(**changes: object) -> Job:
            settings = SETTINGS | KERNEL_HEADS | {key.replace("__", "."): value for key, value in changes.items()}
            overrides = tuple(f"{key}={str(value).lower()}" for key, value in settings.items())
            _, config = settings_of(TrainOptions(preset="smoke", out=tmp_path / "none", overrides=overrides))
            policy, tokenizer = started.load_policy(dataset)
            return Job(build_engine(config, dataset, policy, tokenizer, CUDA), trace)

        yield opened


@pytest.fixture(scope="session")
def checkpoint(started: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the SFT stage after a step on the CPU."""
    _, engine, stage = open_stage("sft", TrainOptions(out=started.path))
    optimizer = make_optimizer(engine.policy, stage.config, engine.config.train)
    update(stage, engine.policy, optimizer, 1e-3, 1.0, read_step(stage, 0, my_micro_batches(1), 0))
    folder = tmp_path_factory.mktemp("checkpoints")
    StageCheckpoints(folder, 1, stage.name, engine.policy, optimizer, Mock(), background=False).save(1, wait=True)
    return folder / "1-sft-000001"
