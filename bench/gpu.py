"""All that a GPU box has to prove, within nine minutes: training runs, the kernels are right, and how fast all is.

    python -m bench gpu --out DIR

Every row is appended to DIR/rows.jsonl when it is made. In this order:

1. `negfast train --preset smoke` on CUDA, from start to end; at the same time
2. the kernel tests, compiled, in a process for each CPU core: a kernel is compiled once, by whichever needs it first;
3. GRPO, SFT and rollout steps at the sizes of the targets beside eager code and peers, a process each;
4. the kernels alone (DIR/kernels.json); 5. compute-sanitizer, where installed.

Each has its share of the time. What does not end in it is "late", which says nothing of its results. A kernel whose
tests fail is "wrong": eager code takes its place in the rows of 3, which say so under "eager". Without a GPU nothing is
measured.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_steps import PARTS, TARGETS, ratios_of
from bench.machine import versions, write_result
from tests.kernels.conftest import DEVICE_LOST

BUDGET_S = 510.0  # of the nine minutes; the rest is for starting and writing
CORRECTNESS_S = 120.0
TRAINING_S = 25.0  # of the smoke training, which starts with the tests: what it may take after them
STEPS_S = {"grpo": 170.0, "sft": 55.0, "rollout": 45.0}
KERNELS_S = 65.0
SANITIZER_S = 30.0
PACKAGES = "negfast", "torch", "triton", "transformers", "trl", "vllm", "liger-kernel", "flash-attn"
ROOT = Path(__file__).parents[1]
TESTS = "tests/kernels/device"
KERNEL_OF = {  # the kernel that a failing module of TESTS names; eager code can take its place
    "test_trie_grpo": ("trie_grpo",),
    "test_sid_cross_entropy": ("sid_cross_entropy",),
    "test_prompt_attention": ("attention",),
    "test_completion_attention": ("attention",),
    "test_vocabulary_cross_entropy": ("liger",),
    "test_add_norm": ("liger",),  # which stands for all of the fused layers
    "test_fused_layers": ("liger",),
    "test_training_step": (),  # whole steps, of all kernels: the row says it
    "test_bench": (),
}

Row = dict[str, Any]


def run(out: Path) -> dict[str, Any]:
    """Summary of what was proven and timed; raises RuntimeError without a GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("bench gpu: no CUDA GPU found; `python -m bench kernels` predicts floors without one")
    out.mkdir(parents=True, exist_ok=True)
    visit = Visit(out, time.monotonic() + BUDGET_S)
    training = Process([sys.executable, "-c", NEGFAST, *SMOKE, "--out", str(out / "smoke")])
    wrong = visit.check_kernels(CORRECTNESS_S, max(len(os.sched_getaffinity(0)) - 2, 1))
    visit.finish_training(training, out / "smoke")
    for part, seconds in STEPS_S.items():
        visit.time_steps(part, seconds, wrong)
    timed = visit.time_kernels(KERNELS_S)
    visit.sanitize(SANITIZER_S)
    result = {
        "bench": "gpu",
        "device": torch.cuda.get_device_name(),
        "versions": versions(*PACKAGES),
        "rows": visit.rows,
        "ratios": [*timed.get("ratios", []), *ratios_of(visit.rows)],
        "floor": timed.get("floor", {}),
    }
    write_result(out / "gpu.json", result)
    return result


NEGFAST = "from negfast.cli import main; main()"
SMOKE = "train", "--preset", "smoke", "--set", "train.device=cuda"


class Visit:
    """The rows of one visit, each written when it is made, and the time that is left of it."""

    def __init__(self, out: Path, deadline: float) -> None:
        self.out, self.deadline = out, deadline
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with (self.out / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['case'].get('bench')} {row['system']}: {row.get('median_s', row['status'])}", flush=True)

    def left(self, share: float) -> float:
        """Seconds of a share that are left of the whole."""
        return max(min(share, self.deadline - time.monotonic()), 0.0)

    def finish_training(self, training: "Process", run: Path) -> None:
        """The row of a training that was started before; it is ok if the last stage left its weights."""
        status, text = training.wait(self.left(TRAINING_S))
        if status == "ok" and not (run / "checkpoints" / "grpo").exists():
            status = "failed: no weights of the last stage"
        row: Row = {"system": "negfast", "case": {"bench": "negfast train --preset smoke, CUDA"}, "status": status}
        self.add(row | {"seconds": training.seconds()} | ({} if status == "ok" else {"output": text[-4000:]}))

    def check_kernels(self, seconds: float, processes: int) -> tuple[str, ...]:
        """The kernels whose tests failed; a row for each module of tests."""
        command = [sys.executable, "-m", "pytest", TESTS, "-v", "--tb=short", "-p", "no:cacheprovider"]
        parts = [
            Process(command, NEGFAST_TEST_PART=f"{number}/{processes}", TRITON_INTERPRET=None)
            for number in range(processes)
        ]
        limit = time.monotonic() + self.left(seconds)
        said = [part.wait(max(limit - time.monotonic(), 0.0)) for part in parts]
        ended: dict[str, dict[str, int]] = {}
        for _, text in said:
            for module, outcome in re.findall(rf"{TESTS}/(\w+)\.py::.* (PASSED|FAILED|ERROR)", text):
                counts = ended.setdefault(module, dict.fromkeys(("PASSED", "FAILED", "ERROR"), 0))
                counts[outcome] += 1
        lost = sum(status.startswith("late") or DEVICE_LOST in text for status, text in said)
        wrong: set[str] = set()
        for module, kernels in KERNEL_OF.items():
            counts = ended.get(module, {})
            failed = counts.get("FAILED", 0) + counts.get("ERROR", 0)
            status = f"wrong: {failed} tests failed" if failed else "ok"
            if not failed and (lost or not counts):
                status = f"late: {lost} of {processes} processes ended before" if lost else "failed: no test ran"
            if failed:
                wrong.update(kernels)
            row: Row = {"system": "negfast", "case": {"bench": "kernel tests", "module": module}, "status": status}
            self.add(row | {"passed": counts.get("PASSED", 0), "seconds": max(part.seconds() for part in parts)})
        if any(status != "ok" for status, _ in said):
            bad = [text for status, text in said if status != "ok"]
            (self.out / "kernel-tests.txt").write_text("\n\n".join(bad), "utf-8")
        return tuple(sorted(wrong))

    def time_steps(self, part: str, seconds: float, wrong: tuple[str, ...]) -> None:
        """Rows of whole steps. Where the process dies it goes on with the next job."""
        command = [sys.executable, "-m", "bench.gpu_steps", part]
        limit = time.monotonic() + self.left(seconds)
        jobs = [(job.system, job.case) for job in PARTS[part](torch.device("cuda"), TARGETS)]
        done = 0
        while done < len(jobs):
            left = limit - time.monotonic()
            if left < 5.0:
                status, rows, text = "late: not begun", [], ""
            else:
                options = ["--begin", str(done), "--seconds", f"{0.8 * left:.0f}", "--eager", *wrong]
                status, text = Process([*command, *options]).wait(left)
                rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"system"')]
            for row in rows[: len(jobs) - done]:
                self.add(row)
            lost = bool(rows) and ("CUDA" in rows[-1]["status"] or "device-side" in rows[-1]["status"])
            done += len(rows)
            if done < len(jobs) and not lost:
                system, case = jobs[done]
                status = "failed: ended without a row" if status == "ok" else status
                ended: Row = {"system": system, "case": case, "status": status}
                self.add(ended | ({"output": text[-2000:]} if status.startswith("failed") else {}))
                done += 1

    def time_kernels(self, seconds: float) -> dict[str, Any]:
        """The result of `bench kernels` as far as it came."""
        path, seconds = self.out / "kernels.json", self.left(seconds)
        command = [sys.executable, "-m", "bench", "kernels", "--out", str(path), "--seconds", f"{0.8 * seconds:.0f}"]
        process = Process(command)
        status, text = process.wait(seconds)
        row: Row = {"system": "negfast", "case": {"bench": "kernels"}, "status": status}
        self.add(row | {"seconds": process.seconds()} | ({} if status == "ok" else {"output": text[-4000:]}))
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def sanitize(self, seconds: float) -> None:
        """compute-sanitizer's memory check of one small test a kernel."""
        row: Row = {"system": "negfast", "case": {"bench": "compute-sanitizer"}, "status": "not installed"}
        if shutil.which("compute-sanitizer"):
            small = "test_the_gradient_arrives or test_rows_without or test_without_an_addition"
            small += " or test_completions and 3-3-3 or test_prompts and 32"
            command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
            command += ["-m", "pytest", TESTS, "-q", "-x", "-k", small]
            row["status"], text = Process(command).wait(self.left(seconds))
            if row["status"].startswith("failed"):
                row["output"] = text[-2000:]
        self.add(row)


class Process:
    """A command of the project's root, from its start; what it prints goes to a file, so that a late one loses none."""

    def __init__(self, command: Sequence[str], **changes: str | None) -> None:
        environment = os.environ | {name: value for name, value in changes.items() if value is not None}
        environment = {name: value for name, value in environment.items() if changes.get(name, "") is not None}
        self.text = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process's row
        self.began, self.ended = time.monotonic(), 0.0
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.text, stderr=subprocess.STDOUT)

    def wait(self, seconds: float) -> tuple[str, str]:
        """("ok", "failed: exit code N" or "late: stopped after N s", what it printed); a late process is ended."""
        try:
            code = self.process.wait(seconds)
            status = "ok" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = f"late: stopped after {time.monotonic() - self.began:.0f} s"
        self.ended = time.monotonic()
        with self.text as file:
            file.seek(0)
            return status, file.read().decode(errors="replace")

    def seconds(self) -> float:
        return self.ended - self.began
