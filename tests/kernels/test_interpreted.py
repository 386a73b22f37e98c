"""The tests under device/ in Triton's interpreter, in a process for each of CI's two cores; no GPU needed."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "device"
PROCESSES = 2


@pytest.fixture(scope="module")
def runs() -> Iterator[list[tuple[subprocess.Popen, Path]]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    modules = sorted(map(str, FOLDER.glob("test_*.py")))
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number in range(PROCESSES):
            log = Path(folder) / str(number)
            command = [sys.executable, "-m", "pytest", *modules[number::PROCESSES], "--durations=3"]
            with log.open("w") as file:
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            started.append((process, log))
        yield started
        for process, _ in started:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", range(PROCESSES))
def test_interpreted(number: int, runs: list[tuple[subprocess.Popen, Path]]):
    process, log = runs[number]
    code = process.wait(timeout=600)
    assert code == 0, log.read_text()
