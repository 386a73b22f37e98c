"""SFT with whole histories beside its alternatives: seconds and positions a supervised target, and peak memory.

A target is a next dislike or a next like. All sides train the quickstart's decoder (Qwen3, 128 x 4, random
weights) in float32, by AdamW, on the same data set; they take turns, a step each, each in a process of its own.

- ``histories``: negfast's training step, reading included. Requests branch off whole histories.
- ``requests``: the same step, targets and micro-batches, but each request has a history of its own: the same
  positions that its branch sees, nothing shared. Cutting them is cheaper than packing them would
  be, so this side is flattered a little.
- ``trainer``: transformers' Trainer with a row a target, padded on the right, on targets drawn from the same steps. A
  row has the same positions: a history's are sums of token embeddings, handed over as ``inputs_embeds`` (spelt as
  tokens they would be several times as many). Rows are sorted by length, need no mask, and logits are made at labels
  alone; the micro-batch is the fastest of a sweep. Collating is not timed.
- ``before``: the training step of an older checkout with its defaults, where every user-day was a prompt (``--before``,
  a checkout of commit ec49f6b with its ``.venv``). It draws its own targets, of the same requests, without verdicts.

Counted beside timed: positions, attention's pairs of query and key in a layer, and the decoder's operations by
`negfast.train.speed.Meter`, a target each. "predicted" is what a side's operations are to those of ``histories``.

The cases: MovieTweetings (embedded; context "day"), synthetic histories of 1,000 events with a request every ten, and
with ``--data DIR`` the folders DIR/polis (context "event") and DIR/california (window 1,024) as prepared by

    negfast prepare polis/events.tsv.gz --items polis/items.tsv.gz --item-text-column text \\
        --item-attributes conversation --dislike label==dislike --like-rule label==like --encoder tfidf --out DIR/polis
    negfast prepare california-2015/events.tsv.gz --items california-2015/items.tsv.gz --item-text-column text \\
        --item-attributes author --item-attributes location --dislike label==dislike --like-rule label==like \\
        --encoder tfidf --out DIR/california

The case "grpo" is "user" of `bench grpo`: eight requests of a user of 512 events, 16 completions each.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import grpo
from bench.machine import device_name, versions, write_result
from bench.sequences import prepare_long_histories
from negfast.config import load_config
from negfast.errors import InputError
from negfast.prepare.build import SemanticIdSettings
from negfast.prepare.samples import prepare_movietweetings

ROOT = Path(__file__).parents[1]
CASES = {  # the settings of each
    "movietweetings": (),
    "polis": ("history.context=event",),
    "california": ("history.window=1024", "sft.histories=4"),
    "synthetic": ("history.window=1024", "sft.histories=2", "sft.requests_per_history=101"),
}
COUNTED = "positions", "pairs", "flops"


@dataclass(frozen=True)
class Task:
    """A case as its sides need it."""

    name: str
    data: Path
    overrides: tuple[str, ...]
    steps: int  # the first warms up
    threads: int

    def line(self, **more: object) -> str:
        known = {"data": str(self.data), "overrides": self.overrides, "steps": self.steps, "threads": self.threads}
        return json.dumps({**known, **more})


class Side:
    """A process that makes a step whenever asked."""

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        self.command = command
        self.steps: list[dict[str, float]] = []

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self) -> dict[str, Any]:
        """The next line of the process; RuntimeError where it ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"bench histories: ended without an answer: {' '.join(self.command)}")
        return json.loads(line)

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self.answer())


def run(
    out: Path | None = None,
    data: Path | None = None,
    before: Path | None = None,
    only: str = "",
    settings: str = "",
    repeats: int = 5,
    threads: int = 2,
    peers: bool = True,
) -> dict[str, Any]:
    """Measures the cases, or ``only`` those named with commas between, and writes the JSON result after each.

    ``settings``, with commas between, come after each case's own, as in "history.positions=codes,sft.histories=8".
    Without ``peers`` neither the Trainer nor TRL is measured.
    """
    known = [*CASES, "grpo"]
    names = [name for name in known if data is not None or name not in ("polis", "california")]
    if only:
        names = only.split(",")
        if wrong := [name for name in names if name not in known]:
            raise InputError(f"--only: found {wrong[0]!r}, expected one of {', '.join(known)}")
    more = tuple(filter(None, settings.split(",")))
    load_config(None, "quickstart", more)  # raises where one is wrong
    result: dict[str, Any] = {
        "bench": "histories",
        "device": device_name(),
        "threads": threads,
        "versions": versions(*grpo.PACKAGES),
        "rows": [],
        "ratios": [],
    }
    for name in names:
        if name == "grpo":
            part = grpo.run(None, repeats=repeats, peer="trl" if peers else "none", threads=threads, only="user")
            result["rows"] += part["rows"]
            result["ratios"] += part["ratios"]
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = find_data(name, data, Path(folder) / "data")
                task = Task(name, path, (*CASES[name], *more), repeats + 1, threads)
                rows = measure(task, before, peers)
            result["rows"] += rows
            result["ratios"] += ratios_of(rows)
        if out is not None:
            write_result(out, result)
    return result


def find_data(name: str, given: Path | None, folder: Path) -> Path:
    """The data set of a case; made in ``folder`` where it is not ``given``. InputError where it is missing."""
    if name == "movietweetings":
        return prepare_movietweetings(folder, semantic_ids=SemanticIdSettings(encoder="tfidf"), report=_quiet).path
    if name == "synthetic":
        return prepare_long_histories(folder).path
    if given is None or not (given / name).is_dir():
        raise InputError(f"--data: found no folder {name!r} in {given}, expected a prepared data set")
    return (given / name).resolve()


def _quiet(_: str) -> None:
    pass


def measure(task: Task, before: Path | None, peers: bool) -> list[dict[str, Any]]:
    """A row for each side."""
    here = [sys.executable, "-m", "bench.history_sides"]
    commands = {side: [*here, task.line(side=side)] for side in ("histories", "requests")}
    about: dict[str, dict[str, Any]] = {}
    if peers:
        with Side([*here, task.line(side="sweep")]) as sweep:
            swept = sweep.answer()["sweep_s"]
        best = min(swept, key=lambda size: swept[size])
        about["trainer"] = {"micro_batch": int(best), "sweep_s": swept}
        commands["trainer"] = [*here, task.line(side="trainer", micro_batch=int(best))]
    if before is not None:
        python = before.resolve() / ".venv" / "bin" / "python"
        if not python.exists():
            raise InputError(f"--before: found no {python}, expected a checkout with its environment")
        commands["before"] = [str(python), str(ROOT / "bench" / "history_before.py"), task.line()]
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Side(command)) for name, command in commands.items()}
        started = {name: side.answer() for name, side in sides.items()}
        for _ in range(task.steps):
            for side in sides.values():
                side.step()
    rows = [row_of(name, task, side.steps, about.get(name, {}) | started[name]) for name, side in sides.items()]
    print_rows(rows)
    return rows


def row_of(side: str, task: Task, steps: list[dict[str, float]], about: dict[str, Any]) -> dict[str, Any]:
    """Figures a target: medians over the steps after the first, and what was counted in all of them."""
    timed = steps[1:]
    targets = sum(step["targets"] for step in timed)
    return {
        "system": side,
        "case": {"name": task.name, "settings": list(task.overrides)},
        "status": "ok",
        "median_s": statistics.median(step["seconds"] / step["targets"] for step in timed),
        "seconds": [step["seconds"] for step in timed],
        "targets": [step["targets"] for step in timed],
        **{key: sum(step[key] for step in timed) / targets for key in COUNTED},
        **about,
        "peak_mib": steps[-1]["peak_mib"],
    }


def ratios_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each other side takes for what ``histories`` takes: time, operations, memory above what it began with."""
    mine, *others = rows
    ratios = []
    for row in others:
        about = {"case": row["case"], "peer": row["system"], "figure": "median_s"}
        memory = (row["peak_mib"] - row["start_mib"]) / max(mine["peak_mib"] - mine["start_mib"], 1.0)
        ratio = {"ratio": row["median_s"] / mine["median_s"], "predicted": row["flops"] / mine["flops"]}
        ratios.append({**about, **ratio, "memory": memory})
    return ratios


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table of a case; all but memory are a target."""
    print(f"{rows[0]['case']['name']:<16}      ms  positions     pairs   MFLOP    time  predicted  peak MiB (at start)")
    for row, ratio in zip(rows, [{"ratio": 1.0, "predicted": 1.0}, *ratios_of(rows)], strict=True):
        print(
            f"  {row['system']:<14}{1e3 * row['median_s']:8.2f}{row['positions']:11.1f}{row['pairs']:10,.0f}"
            f"{row['flops'] / 1e6:8.1f}{ratio['ratio']:7.1f}x{ratio['predicted']:10.1f}x"
            f"{row['peak_mib']:10,.0f} ({row['start_mib']:,.0f})",
            flush=True,
        )
