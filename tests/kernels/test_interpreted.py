"""The tests under device/ in Triton's interpreter, a process each, started together; no GPU needed."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "device"
MODULES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started = {}
        for module in MODULES:
            log = Path(folder) / module
            command = [sys.executable, "-m", "pytest", str(FOLDER / f"{module}.py"), "--durations=3"]
            with log.open("w") as file:
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            started[module] = process, log
        yield started
        for process, _ in started.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module: str, runs: dict[str, tuple[subprocess.Popen, Path]]):
    process, log = runs[module]
    code = process.wait(timeout=600)
    assert code == 0, log.read_text()
