"""The tests under traced/, in a process in which torch finds the CUDA device of fake_cuda.cpp."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
HALF = "counts or mistakes or execution"  # of the tests, in seconds


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA, so no other can take its place")
def test_traced(tmp_path):
    torch_folder, library = Path(torch.__file__).parent, tmp_path / "libfake_cuda.so"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC"]
    hidden = ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]  # or torch would use our copies of its inline code
    folders = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    command = [*compiler, *hidden, *folders, FOLDER / "fake_cuda.cpp", "-o", library, "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "FAKE_CUDA": "1", "OMP_NUM_THREADS": "1"}
    pytest_command = [sys.executable, "-m", "pytest", str(FOLDER / "traced"), "--durations=5", "-k"]
    runs = [  # a process for each of CI's two cores
        subprocess.Popen([*pytest_command, part], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for part in (HALF, f"not ({HALF})")
    ]
    try:
        said = [run.communicate(timeout=400)[0].decode() for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 for run in runs), "\n".join(said)
