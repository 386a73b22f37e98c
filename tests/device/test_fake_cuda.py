"""The tests under traced/, in a process in which torch finds the CUDA device of fake_cuda.cpp."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA, so no other can take its place")
def test_traced(tmp_path):
    torch_folder, library = Path(torch.__file__).parent, tmp_path / "libfake_cuda.so"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC"]
    hidden = ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]  # or torch would use our copies of its inline code
    folders = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    command = [*compiler, *hidden, *folders, FOLDER / "fake_cuda.cpp", "-o", library, "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "FAKE_CUDA": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", FOLDER / "traced", "--durations=5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
