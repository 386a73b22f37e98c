"""What a finished run answers in one process: pairs and lists a second, on one core.

Pairs come as a recommender has them (100 candidates of each user), as 500 candidates of one user, and at random.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import negfast
from bench.machine import device_name, resident_mib, versions
from negfast.errors import InputError

CALLS = 3


def run(run: Path | None = None, pairs: int = 100_000, users: int = 500, seed: int = 0) -> dict[str, Any]:
    """Times `Run.score` of ``pairs`` and `Run.predict` of lists of 50 for ``users``, the median of 3 calls each."""
    if run is None:
        raise InputError("--run: found none, expected a finished run")
    torch.set_num_threads(1)
    code = "import time; t = time.perf_counter(); import negfast; print(time.perf_counter() - t)"
    imported = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    start = time.perf_counter()
    asks = negfast.load(run)
    loaded = time.perf_counter() - start
    data, rng = asks._engine.data, np.random.default_rng(seed)
    user_ids, item_ids = np.array(data.user_ids), np.array(data.items.ids)
    long = user_ids[np.argsort(np.diff(data.log.user_offsets))[-len(user_ids) // 100]]  # longer than 99 % of histories
    hundreds = np.repeat(rng.choice(user_ids, pairs // 100), 100)
    anyone, items = rng.choice(user_ids, pairs), rng.choice(item_ids, pairs)
    some = rng.choice(user_ids, min(users, len(user_ids)), replace=False)
    rows = [
        timed("500 candidates of one user", "pairs", 500, lambda: asks.score([long] * 500, items[:500])),
        timed("100 candidates a user", "pairs", len(hundreds), lambda: asks.score(hundreds, items[: len(hundreds)])),
        timed("pairs at random", "pairs", pairs, lambda: asks.score(anyone, items)),
        timed("lists of 50", "users", len(some), lambda: asks.predict(some, top=50)),
    ]
    print(f"import {imported * 1e3:.0f} ms, load {loaded:.1f} s, peak {resident_mib(peak=True):.0f} MiB")
    return {
        "device": device_name(),
        "versions": versions("torch", "numpy", "pyarrow"),
        "import_ms": round(imported * 1e3, 1),
        "load_s": round(loaded, 2),
        "peak_mib": round(resident_mib(peak=True)),
        "rows": rows,
    }


def timed(what: str, unit: str, count: int, call: Callable[[], object]) -> dict[str, Any]:
    """CPU time of a call, after one that warms up."""
    call()
    taken = []
    for _ in range(CALLS):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    seconds = statistics.median(taken)
    print(f"{what:<28} {seconds * 1e3:>9.1f} ms  {count / seconds:>9,.0f} {unit}/s")
    return {
        "what": what,
        "unit": unit,
        "count": count,
        "ms": round(seconds * 1e3, 1),
        "a_second": round(count / seconds),
    }
