"""`prepare` of synthetic logs of growing size, beside what DuckDB and Polars need to sort the same files by user and
time and no more: wall and CPU seconds, peak resident memory, and disk.

Each run is a process of its own, the systems take turns, and figures are medians. The log has integer ids and no item
table, so items lie where co-occurrence puts them. "negfast events" is `prepare` up to the written histories, without
semantic IDs and the libraries that these need. "first step" is `train --preset smoke` on the data set up to its first
step, with the seconds of each part that it tells.
"""

import importlib.util
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.command import numbers
from bench.machine import device_name, versions
from bench.synthetic_log import write_log
from negfast.data.dataset import Dataset
from negfast.errors import InputError
from negfast.memory import parse_bytes

DUCKDB = """
import duckdb
database = duckdb.connect(config={"memory_limit": "{memory}", "temp_directory": "{out}.spilled", "threads": {cores}})
database.execute('COPY (FROM "{log}/*.parquet" ORDER BY "user", "time") TO "{out}" (FORMAT parquet)')
"""
POLARS = """
import polars
polars.scan_parquet("{log}/*.parquet").sort("user", "time").sink_parquet("{out}")
"""
EVENTS = """
import time
from pathlib import Path
from negfast.prepare.build import RESERVED
from negfast.prepare.events import EventMapping, Selection
from negfast.prepare.reading import LogReader, log_files, read_file, scratch_sorter, sort_log
from negfast.prepare.rules import parse_rule
from negfast.prepare.writing import write_log
mapping = EventMapping((parse_rule("rating<=2"),), value="rating", time_unit="s")
out = Path("{out}").parent
reader = LogReader(log_files([Path("{log}")]), read_file(mapping), mapping, print, Selection(), time.time())
with scratch_sorter(out, {bytes} - RESERVED) as sorter:
    write_log(out, sort_log(reader, sorter)[0], horizon=7)
"""
POLL_SECONDS = 0.05
PART = re.compile(r"^(.+?): (?:.*, )?([\d.]+) s$", re.MULTILINE)  # of what `train` says before its first step


def run(events: str = "100000,1000000", memory: str = "4GB", runs: int = 3, folder: Path | None = None) -> dict:
    """``events``: sizes of the logs; ``memory``: the limit of `prepare` and DuckDB (Polars has none); ``folder``: where
    the logs lie meanwhile. The result has a row for each size and system."""
    sizes = numbers(events, "--events")
    if runs < 1:
        raise InputError(f"--runs: found {runs}, expected at least 1")
    limit = parse_bytes("--memory", memory)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=folder) as scratch:
        for size in sizes:
            log = write_log(Path(scratch) / "log", size)
            commands = _commands(log, Path(scratch) / "out", limit)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in (*commands, "first step")}
            for _ in range(runs):
                for name, command in commands.items():
                    found[name].append(_measure(command, Path(scratch) / "out"))
                    if name == "negfast":
                        found["first step"].append(_first_step(Path(scratch) / "out"))
            rows += [{"events": size, "system": name, **_medians(figures)} for name, figures in found.items()]
            _print(rows[-len(found) :])
            shutil.rmtree(log)
    packages = ("negfast", "duckdb", "polars", "pyarrow")
    return {"device": device_name(), "versions": versions(*packages), "memory": memory, "runs": runs, "rows": rows}


def _commands(log: Path, out: Path, memory: int) -> dict[str, list[str]]:
    python, size = sys.executable, f"{memory >> 20}MiB"
    prepare = ["prepare", str(log), "--dislike", "rating<=2", "--value-column", "rating", "--time-unit", "s"]
    commands = {"negfast": [python, "-m", "negfast", *prepare, "--memory", size, "--force", "--out", str(out)]}
    values = {"log": log, "out": out / "sorted.parquet", "memory": size, "bytes": memory}
    values["cores"] = len(os.sched_getaffinity(0))
    for name, text in (("negfast events", EVENTS), ("duckdb", DUCKDB), ("polars", POLARS)):
        if importlib.util.find_spec(name.split()[0]) is not None:
            for key, value in values.items():
                text = text.replace("{" + key + "}", str(value))
            commands[name] = [python, "-c", text]
    return commands


def _first_step(data: Path) -> dict[str, float]:
    """What it takes up to the first step of a smoke run on ``data``, and the parts before it."""
    run = data.with_name("run")
    command = [sys.executable, "-m", "negfast", "train", "--preset", "smoke", "--data", str(data), "--out", str(run)]
    figures = _measure(command, run, until=run / "metrics.jsonl")
    parts = PART.findall(data.with_name("said.txt").read_text("utf-8"))
    shutil.rmtree(run)
    return figures | {f"{part}, s": float(seconds) for part, seconds in parts}


def _measure(command: list[str], out: Path, until: Path | None = None) -> dict[str, float]:
    """A process's seconds, its peak memory and the most disk that it took; InputError where it fails. It is interrupted
    when the file ``until`` has something in it, if given."""
    shutil.rmtree(out, ignore_errors=True)
    if command[1] == "-c":
        out.mkdir()
    most, ended = [0, 0], threading.Event()
    with out.with_name("said.txt").open("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        watch = threading.Thread(target=_watch, args=(out, process.pid, most, ended, until))
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        watch.join()
        if process.returncode and not (until is not None and until.is_file()):
            said.seek(0)
            raise InputError(f"{command[1:3]} failed: {' '.join(said.read().split())[-500:]}")
    figures = {
        "wall_s": seconds,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": most[0] / 1024,
        "peak_disk_mib": max(most[1], _size(out)) / 2**20,
        "disk_mib": _size(out) / 2**20,
    }
    if "prepare" in command:
        made = Dataset.open(out).manifest["semantic_ids"]["report"]
        figures["semantic_ids_s"] = made["embed_seconds"] + made["quantize_seconds"]
    return figures


def _watch(out: Path, process: int, most: list[int], ended: threading.Event, until: Path | None) -> None:
    """Keeps the most memory, KiB, that the process takes, and the most bytes of ``out`` or what is to become it. (What
    `wait4` tells of memory is at least this process's own.) Interrupts it when ``until`` has something in it."""
    while not ended.wait(POLL_SECONDS):
        if until is not None and until.is_file() and until.stat().st_size:
            os.kill(process, signal.SIGINT)
            until = None
        with suppress(OSError):
            status = Path(f"/proc/{process}/status").read_text("utf-8")
            most[0] = max([most[0], *(int(line.split()[1]) for line in status.splitlines() if line[:6] == "VmHWM:")])
        made = [path for path in out.parent.iterdir() if out.name in path.name]
        most[1] = max(most[1], sum(map(_size, made)))


def _size(path: Path) -> int:
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # it was removed meanwhile
            continue
    return total


def _medians(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(figure[name] for figure in figures), 2) for name in figures[0]}


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(", ".join(f"{name} {value:,}" if name != "system" else value for name, value in row.items()))
