"""`negfast profile`: some steps of a stage under a profiler, a trace to look at, and the top of it as a table.

With a GPU and nsys the command runs itself under ``nsys profile`` with a capture range around the steps, and reads the
report; elsewhere torch.profiler does the same.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import EventList

from negfast import spans
from negfast.errors import InputError, TrainingError
from negfast.runtime.engine import Engine
from negfast.runtime.machine import choose_device
from negfast.train.loop import my_micro_batches, update
from negfast.train.optimizer import learning_rate, make_optimizer
from negfast.train.reader import read_steps
from negfast.train.run import check_stage, open_stage
from negfast.train.speed import Meter
from negfast.train.start import TrainOptions, settings_of
from negfast.train.step import Stage

TOP = 10
UNDER_NSYS = "NEGFAST_UNDER_NSYS"  # set in the process that nsys watches
WARM_UP = 2  # steps before those that are recorded
RANGES = ("data", "history", "branches", "reference", "loss", "backward", "optimiser", "checkpoint")


@dataclass(frozen=True)
class Line:
    """One line of a table: total milliseconds, how often, share of the whole."""

    name: str
    total_ms: float
    calls: int
    share: float


def profile(stage: str, steps: int, command: list[str], options: TrainOptions) -> None:
    """Profiles ``steps`` steps of ``stage`` of the run that `negfast train` with the same options would start or
    resume, from the weights the stage would start from (of a run that has not got there: those it has).

    Writes RUN/profile/STAGE.json (or .nsys-rep) and prints the table. ``command`` is the command line without the
    program, to run again under nsys. InputError on an unknown stage.
    """
    check_stage(stage)
    run, settings = settings_of(options)
    on_gpu = choose_device(settings.train.device).type == "cuda"
    nsys = shutil.which("nsys") if on_gpu else None
    folder = run.path / "profile"
    if nsys is not None and UNDER_NSYS not in os.environ:  # which opens the stage itself: no GPU holds it twice
        folder.mkdir(parents=True, exist_ok=True)
        report = run_under_nsys(nsys, folder / stage, command)
        print("\n".join(table_of_report(report)))
        return
    _, engine, made = open_stage(stage, options)
    folder.mkdir(exist_ok=True)
    steps_of = _Steps(made, engine)
    steps_of.run(WARM_UP)
    if UNDER_NSYS in os.environ:
        with spans.marked_by(torch.cuda.nvtx.range), _capture():
            steps_of.run(steps)
        return
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with spans.marked_by(torch.profiler.record_function), torch.profiler.profile(activities=activities) as recorded:
        seconds = steps_of.run(steps)
    trace = folder / f"{stage}.json"
    recorded.export_chrome_trace(str(trace))
    lines = [f"{stage}: {steps} steps, {seconds / steps * 1e3:.1f} ms a step under the profiler; {steps_of.speed()}"]
    lines += table_of_events(recorded.key_averages(), seconds, "cuda" if on_gpu else "cpu")
    print("\n".join([*lines, "", f"trace: {trace} (open it at ui.perfetto.dev)"]))


class _Steps:
    """Steps of a stage, one after the other, as the loop runs them."""

    def __init__(self, stage: Stage, engine: Engine) -> None:
        self.stage, self.policy, self.done = stage, engine.policy, 0
        self.train, self.device = engine.config.train, engine.device
        self.optimizer, self.meter = make_optimizer(self.policy, stage.config, self.train), Meter(self.policy)
        self.figures: list[dict[str, float]] = []

    def run(self, steps: int) -> float:
        """Seconds of ``steps`` further steps."""
        self.figures = []
        micro_batches = my_micro_batches(self.train.accumulate)
        reader = read_steps(self.stage, range(self.done, self.done + steps), micro_batches, self.train, self.device)
        with self.meter, closing(reader):
            for _ in range(steps):
                rate = learning_rate(self.done, self.stage.config)
                with self.meter.step():
                    with spans.data():
                        batches = next(reader)
                    figures = update(self.stage, self.policy, self.optimizer, rate, self.train.clip_norm, batches)
                self.figures.append(self.meter.figures(figures.tokens))
                self.done += 1
        return sum(figures["seconds"] for figures in self.figures)

    def speed(self) -> str:
        """Means over the last run of steps."""
        mean = {name: sum(f[name] for f in self.figures) / len(self.figures) for name in self.figures[0]}
        return "{tokens_per_s:,.0f} tokens/s, MFU {mfu:.1%}, data {data_wait:.1%}, {peak_mib:,.0f} MiB".format(**mean)


def run_under_nsys(nsys: str, report: Path, command: list[str]) -> Path:
    """Runs ``python -m negfast COMMAND`` under nsys, recording from cudaProfilerStart on; the SQLite export."""
    what = [
        "--trace=cuda,nvtx,osrt",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--force-overwrite=true",
    ]
    python = [sys.executable, "-m", "negfast", *command]
    watched = subprocess.run(
        [nsys, "profile", *what, f"--output={report}", *python], env={**os.environ, UNDER_NSYS: "1"}
    )
    if watched.returncode:
        raise TrainingError(f"nsys profile: ended with exit code {watched.returncode}")
    table = report.with_suffix(".sqlite")
    export = [nsys, "export", "--type=sqlite", "--force-overwrite=true", f"--output={table}", f"{report}.nsys-rep"]
    subprocess.run(export, check=True)
    return table


@contextmanager
def _capture() -> Iterator[None]:
    torch.cuda.cudart().cudaProfilerStart()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def table_of_events(events: EventList, seconds: float, device: str) -> list[str]:
    """Ranges of negfast, then the ``TOP`` operations by their own time on the device."""
    total = seconds * 1e3
    is_range = {event.key for event in events if event.key in RANGES or event.key.startswith("level ")}

    def line(event: Any, microseconds: float) -> Line:
        return Line(event.key, microseconds / 1e3, event.count, microseconds / 1e3 / total)

    ranges = [line(event, event.cpu_time_total) for event in events if event.key in is_range]
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    operations = [line(event, getattr(event, own)) for event in events if event.key not in is_range]
    return _tables(ranges, operations)


def table_of_report(path: Path) -> list[str]:
    """The same from the SQLite export of an nsys report; and the share of time in which the GPU was busy.

    InputError where the file is no such export.
    """
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as report:
            kernels = report.execute(
                "SELECT value, SUM(end - start) / 1e6, COUNT(*) FROM CUPTI_ACTIVITY_KIND_KERNEL "
                "JOIN StringIds ON StringIds.id = shortName GROUP BY value"
            ).fetchall()
            spans_of = report.execute("SELECT start, end FROM CUPTI_ACTIVITY_KIND_KERNEL ORDER BY start").fetchall()
            ranges = report.execute(
                "SELECT COALESCE(text, value), SUM(end - start) / 1e6, COUNT(*) FROM NVTX_EVENTS "
                "LEFT JOIN StringIds ON StringIds.id = textId WHERE end IS NOT NULL GROUP BY COALESCE(text, value)"
            ).fetchall()
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path}: is no SQLite export of an nsys report: {error}") from error
    if not spans_of:
        raise InputError(f"{path}: found no kernels, expected a report with a CUDA trace")
    first, last = spans_of[0][0], max(end for _, end in spans_of)
    total = (last - first) / 1e6
    lines = [f"GPU busy {busy_time(spans_of) / 1e6 / total:.1%} of {total:.1f} ms"]
    return lines + _tables(
        [Line(name, ms, calls, ms / total) for name, ms, calls in ranges],
        [Line(name, ms, calls, ms / total) for name, ms, calls in kernels],
    )


def busy_time(intervals: list[tuple[int, int]]) -> int:
    """Length of the union of intervals (start, end), ascending in start."""
    busy, until = 0, intervals[0][0]
    for start, end in intervals:
        busy += max(0, end - max(start, until))
        until = max(until, end)
    return busy


def _tables(ranges: list[Line], operations: list[Line]) -> list[str]:
    lines = []
    for title, rows, most in (("range", ranges, len(ranges)), (f"top {TOP}, own time", operations, TOP)):
        lines += ["", f"{title:<48} {'ms':>10} {'calls':>7} {'share':>7}"]
        for row in sorted(rows, key=lambda row: -row.total_ms)[:most]:
            lines.append(f"{row.name[:48]:<48} {row.total_ms:>10.1f} {row.calls:>7} {row.share:>7.1%}")
    return lines
