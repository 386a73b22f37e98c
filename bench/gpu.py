"""Everything that a GPU box has to prove, within nine minutes: first that the kernels are right, then how fast all is.

    python -m bench gpu --out DIR

writes DIR/gpu-correctness.json, DIR/kernels.json and, where those benches exist, DIR/grpo.json, rollout.json, sft.json,
each as soon as it is known. Kernels that are wrong are not timed. Without a GPU it says so and measures nothing.
"""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import kernels

BUDGET_S = 520.0  # of the nine minutes; the rest is for starting and writing
CORRECTNESS_S = 200.0
SANITIZER_S = 45.0
KERNELS_S = 120.0
WHOLE_STEPS = "grpo", "rollout", "sft"
ROOT = Path(__file__).parents[1]


def run(out: Path) -> dict[str, Any]:
    """Summary of what was proven and timed; raises RuntimeError without a GPU, or where a kernel is wrong.

    ``bench.grpo``, ``bench.rollout`` and ``bench.sft`` are asked in that order, each with ``run(out=PATH)`` and, if
    its ``run`` takes it, ``seconds``, its share of the time that is left.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("bench gpu: no CUDA GPU found; `python -m bench kernels` predicts floors without one")
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + BUDGET_S
    correctness = check_kernels(CORRECTNESS_S)
    if correctness["status"] == "ok":
        correctness["sanitizer"] = sanitize(SANITIZER_S)
    _write(out / "gpu-correctness.json", correctness)
    if correctness["status"] != "ok":
        raise RuntimeError(f"bench gpu: kernels failed their tests, see {out / 'gpu-correctness.json'}")
    done = {"kernels": kernels.run(out=out / "kernels.json", seconds=KERNELS_S)}
    existing = [name for name in WHOLE_STEPS if find_spec(f"bench.{name}")]
    status = {}
    for position, name in enumerate(existing):
        left = deadline - time.monotonic()
        if left < 20:
            status[name] = "not reached"
            continue
        function = importlib.import_module(f"bench.{name}").run
        options: dict[str, Any] = {"out": out / f"{name}.json"}
        if "seconds" in inspect.signature(function).parameters:
            options["seconds"] = left / (len(existing) - position)
        done[name] = function(**options)
    return {
        "bench": "gpu",
        "device": torch.cuda.get_device_name(),
        "versions": done["kernels"]["versions"],
        "rows": [correctness] + [{"system": "negfast", "case": {"bench": n}, "status": s} for n, s in status.items()],
        "ratios": [ratio for result in done.values() for ratio in result.get("ratios", [])],
        "floor": done["kernels"]["floor"],
    }


def check_kernels(seconds: float) -> dict[str, Any]:
    """The kernel tests on this GPU, compiled and not interpreted, as one row."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "tests/kernels/device", "-q", "-x", "--tb=short"]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        text, status = done.stdout + done.stderr, "ok" if done.returncode == 0 else "failed"
    except subprocess.TimeoutExpired as late:
        text, status = str(late.stdout or ""), f"not finished within {seconds:.0f} s"
    passed = re.search(r"(\d+) passed", text)
    if status == "ok" and not passed:
        status = "failed: no test ran"
    row = {
        "system": "negfast",
        "case": {"bench": "kernel tests on the GPU"},
        "status": status,
        "passed": int(passed[1]) if passed else 0,
        "seconds": time.monotonic() - began,
    }
    return row if status == "ok" else row | {"output": text[-4000:]}


def sanitize(seconds: float) -> str:
    """compute-sanitizer's memory check of one small test a kernel: "clean", "errors: ...", or why it was not run."""
    if not shutil.which("compute-sanitizer"):
        return "not installed"
    small = "test_the_gradient_arrives or (test_answers and 3-3-3) or test_prompts and 32"
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    command += ["tests/kernels/device", "-q", "-x", "-k", small]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    return "clean" if done.returncode == 0 else f"errors: {(done.stdout + done.stderr)[-2000:]}"


def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")
