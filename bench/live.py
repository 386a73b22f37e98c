"""Live scoring: what an answer and an event take in process, and what `negfast serve` carries over HTTP.

    python -m bench live --run RUN

In process, on one thread: 500 candidates of a user, the same after an event was added, and adding an event. Over HTTP,
requests arrive at a fixed rate whether or not earlier ones are answered, 9 of 10 score 100 candidates and one tells an
event: the rates double until p99 passes 50 ms, then the last good one (or ``--rate``, and no other) is held for
``--seconds``, with a restart in the middle. Nothing is sent again: what is not answered is an error, and every event
that was answered is kept once.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import negfast
from bench.machine import device_name, resident_mib, versions
from negfast.data.log import DAY
from negfast.errors import InputError
from negfast.serve.live import Live

CANDIDATES, OF_REQUEST = 500, 100
TARGET_MS = 50.0  # p99 over HTTP
STEP_SECONDS = 15


def run(
    run: Path | None = None, seconds: int = 300, rate: int = 0, repeats: int = 300, seed: int = 0
) -> dict[str, Any]:
    """``run`` is a finished run; ``seconds`` that the last good rate, or ``rate``, is held; ``repeats`` of what is
    timed."""
    if run is None:
        raise InputError("--run: found none, expected a finished run")
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    started = time.perf_counter()
    opened = negfast.load(run)
    live = opened.live()
    facts = {"open_s": round(time.perf_counter() - started, 2), "users": len(live.users), "items": len(live.items)}
    rows = in_process(live, repeats, rng)
    facts["resident_mib"] = round(resident_mib())
    users, items = list(live.users), list(live.items)
    http = asyncio.run(over_http(run, users, items, seconds, rate, rng))
    result = {"machine": device_name(), **versions("torch", "fastapi", "uvicorn"), **facts, "rows": rows, "http": http}
    show(result)
    return result


def in_process(live: Live, repeats: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Times of answers to users with a history, each asked at the log's end."""
    items = list(live.items)
    busy = rng.permutation([user for user in live.users if live.user_since[live.users[user]] < live.data_until])
    end = (live.data_until // DAY + 1) * DAY
    clock = iter(range(end, end + 10 * repeats * DAY, DAY))  # a day for each event, so that both contexts see it
    now = next(clock)

    def question(user: str) -> Callable[[], object]:
        drawn = rng.choice(items, CANDIDATES, replace=len(items) < CANDIDATES)
        return partial(live.score, user, drawn, at=np.datetime64(now, "s"))

    for user in busy[:20]:
        question(user)()
    answers = [timed(question(user)) for user in busy[20 : 20 + repeats]]
    adding, after = [], []
    for user in busy[20 : 20 + repeats]:
        item, feedback = str(rng.choice(items)), str(rng.choice(["like", "dislike"]))
        adding.append(timed(partial(live.add, user, item, now, feedback)))
        now = next(clock)
        after.append(timed(question(user)))
    names = ["500 candidates", "500 candidates after an event", "an event"]
    return [
        {"what": name, "ms_p50": percentile(times, 50), "ms_p99": percentile(times, 99)}
        for name, times in zip(names, (answers, after, adding), strict=True)
    ]


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begun)


def percentile(times: list[float], share: int) -> float:
    return round(float(np.percentile(times, share)), 3)


async def over_http(
    run: Path, users: list[str], items: list[str], seconds: int, rate: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A row for each rate, where none is given, and one for the rate that is held."""
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder, "events.jsonl")
        server = Server(run, events)
        rows: list[dict[str, Any]] = []
        try:
            step = 25
            while not rate and (not rows or rows[-1]["ms_p99"] <= TARGET_MS):
                rows.append(await load(server, users, items, step, STEP_SECONDS, rng))
                step *= 2
            if held := rate or max((row["requests_per_s"] for row in rows if row["ms_p99"] <= TARGET_MS), default=0):
                restarted = asyncio.create_task(server.restarted(after=seconds / 2))
                row = await load(server, users, items, held, seconds, rng)
                rows.append({**row, "restart_s": round(await restarted, 1)})
        finally:
            server.stop()
        kept, told = len(events.read_text().splitlines()), sum(row["events"] for row in rows)
        if not told <= kept <= told + sum(row["errors"] for row in rows):
            raise RuntimeError(f"{told} events were acknowledged, but {kept} are kept")
        return rows


class Server:
    """`negfast serve` in a process of its own, on one thread."""

    def __init__(self, run: Path, events: Path) -> None:
        command = [sys.executable, "-m", "negfast", "serve", str(run), "--events", str(events), "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.port = self._running()

    def _running(self) -> int:
        """The port, once the server says that it runs."""
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                return int(found[1])
        raise RuntimeError("".join(said))

    async def restarted(self, after: float) -> float:
        """Seconds that a restart takes, which begins in ``after`` seconds, until requests are answered again."""
        await asyncio.sleep(after)
        begun = time.perf_counter()
        self.process.send_signal(signal.SIGUSR2)
        await asyncio.to_thread(self._running)
        return time.perf_counter() - begun

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


async def load(
    server: Server, users: list[str], items: list[str], rate: int, seconds: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Sends ``rate`` requests a second, each once."""
    times: list[float] = []
    found: Counter[str] = Counter()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        user = users[int(rng.integers(len(users)))]
        if number % 10:
            path, body = "/score", {"user": user, "items": rng.choice(items, OF_REQUEST).tolist()}
        else:
            path, body = "/events", {"events": [{"user": user, "item": str(rng.choice(items)), "feedback": "dislike"}]}
        begun = time.perf_counter()
        try:
            reply = await client.post(f"http://127.0.0.1:{server.port}{path}", json=body)
        except httpx.TransportError:
            found["errors"] += 1
            return
        if reply.status_code != 200:
            found["errors"] += 1
        elif path == "/events":
            found["events"] += reply.json()["accepted"]
        times.append(1000 * (time.perf_counter() - begun))

    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        begun, tasks = time.perf_counter(), []
        for number in range(rate * seconds):
            await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, number)))
        await asyncio.gather(*tasks)
        took = time.perf_counter() - begun
    return {
        "requests_per_s": rate,
        "answered_per_s": round(len(tasks) / took, 1),
        "seconds": seconds,
        "ms_p50": percentile(times, 50),
        "ms_p99": percentile(times, 99),
        "errors": found["errors"],
        "events": found["events"],
    }


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("in process, one thread", "ms p50", "ms p99")
    for row in result["rows"]:
        table.add_row(row["what"], str(row["ms_p50"]), str(row["ms_p99"]))
    console.print(table)
    table = Table("over HTTP: requests/s", "seconds", "ms p50", "ms p99", "errors", "restart s")
    for row in result["http"]:
        figures = [row[key] for key in ("requests_per_s", "seconds", "ms_p50", "ms_p99", "errors")]
        table.add_row(*map(str, figures), str(row.get("restart_s", "")))
    console.print(table)
