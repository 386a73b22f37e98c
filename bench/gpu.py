"""Everything that a GPU box has to prove, within nine minutes: first that the kernels are right, then how fast all is.

    python -m bench gpu --out DIR

writes DIR/gpu-correctness.json, then DIR/kernels.json, gpu-grpo.json, gpu-rollout.json and gpu-sft.json, each as soon
as it is known. The correctness tests hold every kernel against float64, and whole training steps and a beam search
against eager code. Kernels that are wrong are not timed. Without a GPU it says so and measures nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import gpu_steps, kernels
from bench.gpu_steps import TARGETS, Sizes, ratios_of
from bench.machine import versions, write_result

BUDGET_S = 520.0  # of the nine minutes; the rest is for starting and writing
CORRECTNESS_S = 200.0
SANITIZER_S = 40.0
KERNELS_S = 110.0
PACKAGES = "negfast", "torch", "triton", "transformers", "trl", "liger-kernel", "flash-attn"
ROOT = Path(__file__).parents[1]


def run(out: Path) -> dict[str, Any]:
    """Summary of what was proven and timed; raises RuntimeError without a GPU, or where a kernel is wrong."""
    if not torch.cuda.is_available():
        raise RuntimeError("bench gpu: no CUDA GPU found; `python -m bench kernels` predicts floors without one")
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + BUDGET_S
    correctness = check_kernels(CORRECTNESS_S)
    if correctness["status"] == "ok":
        correctness["sanitizer"] = sanitize(SANITIZER_S)
    write_result(out / "gpu-correctness.json", correctness)
    if correctness["status"] != "ok":
        raise RuntimeError(f"bench gpu: kernels failed their tests, see {out / 'gpu-correctness.json'}")
    timed_kernels = kernels.run(out=out / "kernels.json", seconds=KERNELS_S)
    rows = [correctness, *whole_steps(out, torch.device("cuda"), TARGETS, deadline)]
    return {
        "bench": "gpu",
        "device": torch.cuda.get_device_name(),
        "versions": versions(*PACKAGES),
        "rows": rows,
        "ratios": [*timed_kernels["ratios"], *ratios_of(rows)],
        "floor": timed_kernels["floor"],
    }


def whole_steps(out: Path, device: torch.device, sizes: Sizes, deadline: float) -> list[dict[str, Any]]:
    """Rows of GRPO, rollout and SFT steps, each of the three written when it is done; they share the time left."""
    parts: dict[str, Callable[[float], list[dict[str, Any]]]] = {
        "grpo": lambda seconds: gpu_steps.grpo_rows(device, sizes, seconds),
        "rollout": lambda seconds: gpu_steps.beam_rows(device, sizes, seconds),
        "sft": lambda seconds: gpu_steps.sft_rows(device, sizes, seconds),
    }
    rows: list[dict[str, Any]] = []
    for position, (name, call) in enumerate(parts.items()):
        left = deadline - time.monotonic()
        if left < 20:
            found = [{"system": "negfast", "case": {"bench": name}, "status": "not reached"}]
        else:
            try:
                found = call(left / (len(parts) - position))
            except Exception as error:  # the other parts' rows are worth having
                status = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
                found = [{"system": "negfast", "case": {"bench": name}, "status": status}]
        name_of_device = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        result = {"bench": f"gpu-{name}", "device": name_of_device, "versions": versions(*PACKAGES), "rows": found}
        write_result(out / f"gpu-{name}.json", result | {"ratios": ratios_of(found), "floor": {}})
        rows += found
    return rows


def check_kernels(seconds: float) -> dict[str, Any]:
    """The kernel tests on this GPU, compiled and not interpreted, as one row."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "tests/kernels/device", "-q", "-x", "--tb=short"]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        text, status = done.stdout + done.stderr, "ok" if done.returncode == 0 else "failed"
    except subprocess.TimeoutExpired as late:
        text, status = _text(late.stdout) + _text(late.stderr), f"not finished within {seconds:.0f} s"
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
    small = "test_the_gradient_arrives or test_rows_without or (test_completions and 3-3-3) or test_prompts and 32"
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    command += ["tests/kernels/device", "-q", "-x", "-k", small]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    return "clean" if done.returncode == 0 else f"errors: {(done.stdout + done.stderr)[-2000:]}"


def _text(captured: bytes | str | None) -> str:
    """What a process that ran out of time had printed; bytes even where text was asked for."""
    return captured.decode(errors="replace") if isinstance(captured, bytes) else captured or ""
