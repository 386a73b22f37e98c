from pathlib import Path

import pytest

from tests.tiny import prepare, run_cli, train_arguments


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over ``tiny_data``."""
    run = tmp_path_factory.mktemp("run") / "run"
    run_cli(*train_arguments(tiny_data, run))
    return run
