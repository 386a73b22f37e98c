"""Storage of histories: negfast beside what others use, through Python, into the caller's arrays.

Every figure is the median of several runs from a warm page cache. A run opens the files anew, so checksums are
verified in it, and what it gave is compared with the truth. On two cores negfast uses two threads and a peer two
processes with half of the users each, which write to shared memory.

Our write includes making the file durable (fsync); no peer does that. ``histories`` is what a trainer's batch needs
and no peer has: positions, and the seen items of one request at the end of each history.
"""

import contextlib
import io
import json
import logging
import mmap
import multiprocessing
import shutil
import statistics
import tempfile
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import device_name, versions, write_result
from bench.sequences import CODEBOOK, Sequences, make_sequences
from bench.shard_peers import Peer, installed_peers
from negfast.data.log import DAY, EventLog
from negfast.data.shards import PackedHistories, describe_shard, open_shard, write_shard
from negfast.sid.trie import build_trie

BATCH_USERS = 1024  # of a random read, and of a batch of packed histories
HIGHER_IS_BETTER = "write_mev_s", "sequential_mev_s", "random_users_s", "packed_mtok_s"
PACKAGES = "negfast", "numpy", "pyarrow", "zstandard", "datasets", "mosaicml-streaming", "litdata"


@dataclass(frozen=True)
class Contender:
    """A system at work on the benchmark's data: what is timed, and how its output is verified."""

    system: str
    case: dict[str, Any]
    steps: dict[str, Callable[[], Any]]  # write, sequential, random, packed; of negfast also histories
    checks: dict[str, Callable[[], None]]
    before_write: Callable[[], None]
    bytes_written: Callable[[], int]
    random_users: int


class Bench:
    """The data, and arrays in shared memory that every system writes its output to."""

    def __init__(self, data: Sequences, folder: Path) -> None:
        self.log, self.codes, self.folder = data.log, data.codes, folder
        self.item_nodes = build_trie(data.codes, CODEBOOK).item_nodes
        n = len(data.log)
        self.out = _shared(n, np.int32), _shared(n, np.uint8), _shared(n, np.int64)
        self.tokens = _shared(n * data.codes.shape[1], np.uint16).reshape(n, -1)
        self.order = np.random.default_rng(1).permutation(data.log.n_users)

    def clear(self) -> None:
        """What an earlier system left must not pass for the next one's output."""
        for array in (*self.out, self.tokens):
            array[:: max(1, len(array) // 4096)] = 0

    def check_sequential(self, log: EventLog, time_unit: int = 1) -> None:
        truth = log.item, log.feedback, log.time // time_unit * time_unit
        if not all(np.array_equal(found[: len(log)], true) for found, true in zip(self.out, truth, strict=True)):
            raise AssertionError("sequential read gave something else than was written")

    def check_tokens(self, log: EventLog) -> None:
        if not np.array_equal(self.tokens[: len(log)], self.codes[log.item]):
            raise AssertionError("packed tokens are not those of the items")

    def check_random(self, log: EventLog, users: np.ndarray, at: int, time_unit: int = 1) -> None:
        """The histories of ``users`` lie one after another from event ``at`` of the output on."""
        lengths = np.diff(log.user_offsets)[users]
        shift = np.repeat(log.user_offsets[users] - (np.cumsum(lengths) - lengths), lengths)
        events = np.arange(lengths.sum()) + shift
        truth = log.item[events], log.feedback[events], log.time[events] // time_unit * time_unit
        found = (column[at : at + len(events)] for column in self.out)
        if not all(np.array_equal(f, t) for f, t in zip(found, truth, strict=True)):
            raise AssertionError("random reads gave something else than was written")

    def check_histories(self, batches: Iterator[PackedHistories]) -> None:
        """The batches are the histories of all users in the order of random reads."""
        at = 0
        for packed in batches:
            users = self.order[at : at + len(packed.prefix)]
            ends = list(zip(self.log.user_offsets[users], self.log.user_offsets[users + 1], strict=True))
            items = np.concatenate([np.append(-1, self.log.item[first:last]) for first, last in ends])
            seen = np.concatenate([np.unique(self.log.item[first:last]) for first, last in ends])
            if not (np.array_equal(packed.item, items) and np.array_equal(packed.seen_item, seen)):
                raise AssertionError("packed histories are not those of the users")
            at += len(users)
        if at != len(self.order):
            raise AssertionError(f"found {at} packed histories, expected {len(self.order)}")


def run(users: int = 200_000, repeats: int = 5, out: Path | None = None) -> dict[str, Any]:
    """Measures all systems on seeded synthetic histories, prints a table, and writes the JSON result to ``out``."""
    with tempfile.TemporaryDirectory(prefix="negfast-bench-", dir=Path.cwd()) as folder:
        bench = Bench(make_sequences(users), Path(folder))
        rows = []
        for cores in (1, 2):
            with contextlib.ExitStack() as stack:
                contenders = [negfast_contender(bench, cores, *r) for r in (("seconds", 1), ("days", DAY))]
                contenders += [stack.enter_context(peer_contender(bench, peer, cores)) for peer in installed_peers()]
                rows += measure(bench, contenders, repeats)
        result = {
            "bench": "shards",
            "device": device_name(),
            "versions": versions(*PACKAGES),
            "rows": rows,
            "ratios": _ratios(rows),
            "floor": _floors(bench, repeats),
        }
    print(json.dumps(result["floor"], indent=1))
    if out is not None:
        write_result(out, result)
    return result


def measure(bench: Bench, contenders: list[Contender], repeats: int) -> list[dict[str, Any]]:
    """Takes turns, so that a machine that slows down for a while does so to all of them; medians of the turns."""
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    sizes = [0] * len(contenders)
    for repeat in range(repeats):
        for k, contender in enumerate(contenders):
            contender.before_write()
            for step, work in contender.steps.items():
                bench.clear()
                start = time.perf_counter()
                work()
                seconds[k, step].append(time.perf_counter() - start)
                if step == "write":
                    sizes[k] = contender.bytes_written()
                elif repeat == 0:
                    contender.checks[step]()
    rows = []
    for k, contender in enumerate(contenders):
        n = contender.case["events"]
        median = {step: statistics.median(seconds[k, step]) for step in contender.steps}
        row = {
            "system": contender.system,
            "case": contender.case,
            "status": "ok",
            "bytes_per_event": sizes[k] / n,
            "write_mev_s": n / median["write"] / 1e6,
            "sequential_mev_s": n / median["sequential"] / 1e6,
            "random_users_s": contender.random_users / median["random"],
            "packed_mtok_s": n * bench.codes.shape[1] / median["packed"] / 1e6,
        }
        if "histories" in median:
            row["histories_mpos_s"] = (n + contender.case["users"]) / median["histories"] / 1e6
        print(_line(row), flush=True)
        rows.append(row)
    return rows


def negfast_contender(bench: Bench, cores: int, resolution: str, time_unit: int) -> Contender:
    path, log = bench.folder / f"events-{resolution}.nfs", bench.log
    users = bench.order.astype(np.int32)

    def read_random() -> None:
        shard, at = open_shard(path), 0
        item, sign, time = bench.out
        for first in range(0, len(users), BATCH_USERS):
            batch = users[first : first + BATCH_USERS]
            offsets, *_ = shard.get_many(batch, cores, (item[at:], sign[at:], time[at:]))
            at += int(offsets[-1])

    def pack_histories() -> Iterator[PackedHistories]:
        shard, end = open_shard(path), int(log.time.max()) + 1
        for first in range(0, len(users), BATCH_USERS):
            batch = users[first : first + BATCH_USERS]
            yield shard.pack(
                users=batch,
                first=np.zeros(len(batch), np.int64),
                views=np.full(len(batch), 3, np.uint8),  # all events shown
                branch_history=np.arange(len(batch), dtype=np.int32),
                moments=np.full(len(batch), end),
                item_nodes=bench.item_nodes,
                threads=cores,
            )

    return Contender(
        "negfast",
        {"cores": cores, "resolution": resolution, "users": log.n_users, "events": len(log), "checksums": True},
        {
            "write": lambda: write_shard(path, log, time_unit, cores),
            "sequential": lambda: open_shard(path).get_many(None, cores, bench.out),
            "random": read_random,
            "packed": lambda: open_shard(path).tokens(None, bench.codes, cores, bench.tokens),
            "histories": lambda: deque(pack_histories(), maxlen=0),
        },
        {
            "sequential": lambda: bench.check_sequential(log, time_unit),
            "random": lambda: bench.check_random(log, bench.order, 0, time_unit),
            "packed": lambda: bench.check_tokens(log),
            "histories": lambda: bench.check_histories(pack_histories()),
        },
        lambda: path.unlink(missing_ok=True),
        lambda: path.stat().st_size,
        len(users),
    )


@contextlib.contextmanager
def peer_contender(bench: Bench, peer: Peer, cores: int) -> Iterator[Contender]:
    """A slice of the users a core; each is written to a folder of its own and read by a process of its own."""
    users = min(peer.users or bench.log.n_users, bench.log.n_users)
    bounds = np.linspace(0, users, cores + 1).astype(int).tolist()
    log = _slice(bench.log, 0, users)
    folders = [bench.folder / f"{peer.name}-{cores}-{core}" for core in range(cores)]

    def slices(core: int) -> tuple[np.ndarray, ...]:
        events = slice(log.user_offsets[bounds[core]], log.user_offsets[bounds[core + 1]])
        return tuple(column[events] for column in bench.out)

    def order(core: int) -> np.ndarray:
        local = bench.order[(bench.order >= bounds[core]) & (bench.order < bounds[core + 1])] - bounds[core]
        return local[: (peer.random_users or len(local) * cores) // cores]

    def write(core: int) -> None:
        peer.write(folders[core], _slice(log, bounds[core], bounds[core + 1]))

    def read(core: int) -> None:
        peer.open(folders[core]).sequential(slices(core))

    orders = [order(core) for core in range(cores)]

    def read_random(core: int) -> None:
        peer.open(folders[core]).random(orders[core], slices(core))

    def pack(core: int) -> None:
        """Items in pieces that fit the cache, and each one's four codes as a 64-bit number: the fastest in numpy."""
        item = slices(core)[0]
        peer.open(folders[core]).sequential((item,))
        table, start = bench.codes.view(np.uint64).reshape(-1), log.user_offsets[bounds[core]]
        tokens = bench.tokens[start : start + len(item)].view(np.uint64).reshape(-1)
        for first in range(0, len(item), 1 << 16):
            np.take(table, item[first : first + (1 << 16)], out=tokens[first : first + (1 << 16)], mode="clip")

    def check_random() -> None:
        for core in range(cores):
            bench.check_random(log, orders[core] + bounds[core], int(log.user_offsets[bounds[core]]))

    def remove() -> None:
        for folder in bench.folder.glob(f"{peer.name}-{cores}-*"):
            shutil.rmtree(folder)

    def bytes_written() -> int:
        size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
        on_cores(1)  # a first read may unpack files; the timed one finds them
        return size

    with _cores(cores, [write, read, read_random, pack]) as on_cores:
        yield Contender(
            peer.name,
            {"cores": cores, "resolution": "seconds", "users": users, "events": len(log), "checksums": peer.checksums},
            {name: partial(on_cores, k) for k, name in enumerate(("write", "sequential", "random", "packed"))},
            {
                "sequential": lambda: bench.check_sequential(log),
                "random": check_random,
                "packed": lambda: bench.check_tokens(log),
            },
            remove,
            bytes_written,
            sum(map(len, orders)),
        )
        remove()


_tasks: list[Callable[[int], None]] = []  # what forked workers call; closures do not travel, a fork inherits them


def _call(task_and_core: tuple[int, int]) -> None:
    with _quiet():
        _tasks[task_and_core[0]](task_and_core[1])


@contextlib.contextmanager
def _cores(cores: int, tasks: list[Callable[[int], None]]) -> Iterator[Callable[[int], None]]:
    """Gives a function that runs a task on every core: in this process for one, in forked ones for more."""
    if cores == 1:

        def here(task: int) -> None:
            with _quiet():
                tasks[task](0)

        yield here
        return
    _tasks[:] = tasks
    with multiprocessing.get_context("fork").Pool(cores) as pool:

        def there(task: int) -> None:
            pool.map(_call, [(task, core) for core in range(cores)], chunksize=1)

        yield there


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' own progress bars and advice out of the table."""
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def _shared(n: int, dtype: type) -> np.ndarray:
    """Zeros that forked processes write to as well, their pages already there."""
    array: np.ndarray = np.frombuffer(mmap.mmap(-1, max(1, n) * np.dtype(dtype).itemsize), dtype)[:n]
    array[:] = 0
    return array


def _slice(log: EventLog, first: int, last: int) -> EventLog:
    offsets = log.user_offsets[first : last + 1]
    events = slice(offsets[0], offsets[-1])
    return EventLog(offsets - offsets[0], log.item[events], log.feedback[events], log.time[events], None, log.n_items)


def _floors(bench: Bench, repeats: int) -> dict[str, float]:
    """What no system of the kind can beat: order-0 entropy for the size, a plain copy of the columns for reading."""
    floors = {}
    for resolution, time_unit in (("seconds", 1), ("days", DAY)):
        path = bench.folder / "floor.nfs"
        write_shard(path, bench.log, time_unit)
        floors[f"order0_bytes_per_event_{resolution}"] = describe_shard(path)["order0_floor"]["total"] / 8
    truth = bench.log.item, bench.log.feedback, bench.log.time

    def copy() -> None:
        for column, true in zip(bench.out, truth, strict=True):
            np.copyto(column, true)

    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    floors["copy_mev_s"] = len(bench.log) / statistics.median(seconds) / 1e6
    return floors


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over the peer's where higher is better, at the same cores; the peer's size over ours."""
    ratios = []
    for ours in rows:
        if ours["system"] != "negfast" or ours["case"]["resolution"] != "seconds":
            continue
        cores = ours["case"]["cores"]
        for theirs in rows:
            if theirs["system"] == "negfast" or theirs["case"]["cores"] != cores:
                continue
            entry = {"case": {"cores": cores}, "peer": theirs["system"]}
            size = theirs["bytes_per_event"] / ours["bytes_per_event"]
            ratios.append(entry | {"figure": "bytes_per_event", "ratio": size})
            for figure in HIGHER_IS_BETTER:
                ratios.append(entry | {"figure": figure, "ratio": ours[figure] / theirs[figure]})
    return ratios


def _line(row: dict[str, Any]) -> str:
    case = row["case"]
    histories = f"  histories {row['histories_mpos_s']:5.1f} Mpos/s" if "histories_mpos_s" in row else ""
    return (
        f"{row['system']:<18} {case['cores']} core{'s' if case['cores'] > 1 else ' '} {case['resolution']:<7}"
        f" {row['bytes_per_event']:7.3f} B/event  write {row['write_mev_s']:6.1f} Mev/s"
        f"  sequential {row['sequential_mev_s']:6.1f} Mev/s  random {row['random_users_s']:9.0f} users/s"
        f"  packed {row['packed_mtok_s']:6.0f} Mtok/s{histories}"
    )
