"""Trains for an hour (or --minutes) over the three stages and fails if memory grows.

    python tools/soak.py                   an hour on the built-in sample
    python tools/soak.py --minutes 3

Each stage gets a third of the time in a run of its own, with validation and checkpoints on the way; the resident size
is sampled every second. It is flat if the median of the last quarter is at most 2 % above that of the second quarter:
the first one fills caches.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GROWTH = 0.02
STAGES = "align", "sft", "grpo"


def main() -> int:
    parser = argparse.ArgumentParser(description="Train for a while and watch memory.")
    parser.add_argument("--minutes", type=float, default=60.0)
    minutes = parser.parse_args().minutes
    flat = True
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            sizes, steps = soak(stage, Path(folder) / stage, 60 * minutes / len(STAGES))
            quarter = len(sizes) // 4
            before, after = statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])
            grown = after / before - 1
            flat &= grown <= GROWTH
            print(f"{stage}: {steps} steps, {before:,.0f} MiB, then {after:,.0f} MiB ({grown:+.2%})", flush=True)
    print("memory is flat" if flat else f"memory grew by more than {GROWTH:.0%}")
    return 0 if flat else 1


def soak(stage: str, run: Path, seconds: float) -> tuple[list[float], int]:
    """Resident sizes in MiB, a second apart, of ``seconds`` of training, and the steps that were made."""
    command = [sys.executable, "-m", "negfast", "train", "--preset", "smoke", "--out", str(run)]
    settings = {f"{name}.steps": 0 if name != stage else 10**9 for name in STAGES}
    settings |= {f"{stage}.warmup": 5, f"{stage}.validate_every": 200, "train.checkpoint_every": 50}
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    metrics = run / "metrics.jsonl"
    log = run.with_suffix(".log")
    with log.open("w") as file, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file) as process:
        while not metrics.exists() or not metrics.stat().st_size:
            if process.poll() is not None:
                said = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
                raise SystemExit(f"{stage}: exit code {process.returncode} before the first step: {said}")
            time.sleep(0.5)
        sizes, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            sizes.append(resident_mib(process.pid))
            time.sleep(1)
        process.send_signal(signal.SIGINT)
        if process.wait() != 130:
            raise SystemExit(f"{stage}: the run ended with exit code {process.returncode}, expected 130")
    return sizes, sum(1 for _ in metrics.open())


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid}: found no resident size, it has ended")


if __name__ == "__main__":
    sys.exit(main())
