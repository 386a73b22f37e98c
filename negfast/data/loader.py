"""Batches of a seeded permutation, read ahead by threads; where it stands is three numbers.

The permutation is computed, not stored (a Feistel network with cycle walking), so any place of it is reached at once
and costs no shuffle buffer. Steps are counted over all ranks: a run that stops can go on with another number of
ranks or workers and sees the rest of the same stream.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from negfast.data.shards import PackedPrompts, PackSizes
from negfast.errors import InputError

Place = TypeVar("Place")
Batch = TypeVar("Batch")

ROUNDS = 6  # of the Feistel network; four already pass for random, two more cost nothing here


@dataclass(frozen=True)
class LoaderState:
    """Everything a loader needs to go on: what it has given, over all ranks."""

    seed: int
    epoch: int = 0
    position: int = 0  # entries of the epoch's permutation given so far


class Permutation:
    """A pseudo-random permutation of 0..size-1 given by (seed, epoch), the same on every machine and numpy."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        self.half_bits = np.uint64(max(1, ((max(1, size - 1)).bit_length() + 1) // 2))
        chosen = np.array([seed, epoch], dtype=np.uint64)
        self.keys = _mix(np.arange(ROUNDS, dtype=np.uint64) + _mix(chosen[:1]) + _mix(~chosen[1:]))

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The entries at ``places`` int [n], int64 [n]."""
        values = self._encipher(np.asarray(places, dtype=np.uint64))
        # The cipher permutes the next power of four; what falls outside goes round again until it is inside.
        while len(outside := np.flatnonzero(values >= self.size)):
            values[outside] = self._encipher(values[outside])
        return values.astype(np.int64)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self.half_bits) - np.uint64(1)
        left, right = values >> self.half_bits, values & mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return left << self.half_bits | right


def epoch_rows(seed: int, task: str, step: int, size: int, count: int) -> np.ndarray:
    """The rows, of ``size``, that step ``step`` of a task visits when each step takes ``count``: permutations one
    after the other, so that every row comes once an epoch and any step is reached at once."""
    count = min(count, size)
    places = np.arange(step * count, (step + 1) * count)
    task_seed = int(task_rng(seed, task, 0).integers(2**63))
    rows = [
        Permutation(size, task_seed, int(epoch))[places[places // size == epoch] % size]
        for epoch in np.unique(places // size)
    ]
    return np.concatenate(rows)


def task_rng(seed: int, task: str, step: int) -> np.random.Generator:
    """A generator of its own for (seed, task, step)."""
    return np.random.default_rng([seed, step, *task.encode()])


def read_ahead(
    read: Callable[[Place], Batch], places: Iterable[Place], workers: int, ahead: int
) -> Generator[Batch, None, None]:
    """``read(place)`` of every place in order, by ``workers`` threads that are at most ``ahead`` places further on.

    What a read raises comes out in its turn. Close the iterator to end the threads.
    """
    rest, pending = iter(places), deque[Future[Batch]]()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="negfast-reader")
    try:
        while True:
            pending.extend(pool.submit(read, place) for place in islice(rest, ahead - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Loader(Generic[Batch]):
    """Gives ``read(rows)`` for batches of rows of 0..size-1, each row once an epoch, read ahead in order.

    For training loops of one's own over shards. negfast's stages mix several tasks in a step, each with its own rows
    (`epoch_rows`), and keep no position: they call `read_ahead` themselves (`negfast.train.reader`).

    A step takes the next ``batch_size`` rows for each of ``world_size`` ranks (fewer at the end of an epoch) and this
    rank reads its share, possibly of no rows. Iterating gives the rest of the current epoch; the next iteration gives
    the next one. ``state`` after a batch is where another loader goes on after that batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        read: Callable[[np.ndarray], Batch],
        state: LoaderState,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
        prefetch: int = 2,
    ) -> None:
        """``read`` gets int64 rows and runs on one of ``workers`` threads, ``prefetch`` batches ahead of use."""
        if not 0 <= rank < world_size:
            raise InputError(f"loader: found rank {rank}, expected 0 to {world_size - 1}")
        if batch_size < 1 or workers < 1 or prefetch < 1:
            raise InputError(
                f"loader: found batch size {batch_size}, {workers} workers, {prefetch} ahead; expected >= 1"
            )
        if not 0 <= state.position <= size:
            raise InputError(f"loader: found position {state.position}, expected 0 to {size}")
        self.size, self.batch_size, self.read, self.state = size, batch_size, read, state
        self.rank, self.world_size, self.workers, self.prefetch = rank, world_size, workers, prefetch

    def __iter__(self) -> Iterator[Batch]:
        seed, epoch = self.state.seed, self.state.epoch
        permutation = Permutation(self.size, seed, epoch)
        step = self.batch_size * self.world_size
        starts = range(self.state.position, self.size, step)

        def read(start: int) -> Batch:
            places = np.arange(start, min(start + step, self.size))
            return self.read(permutation[np.array_split(places, self.world_size)[self.rank]])

        with closing(read_ahead(read, starts, self.workers, self.prefetch)) as batches:
            for start, batch in zip(starts, batches, strict=True):
                self.state = LoaderState(seed, epoch, min(start + step, self.size))
                yield batch
        self.state = LoaderState(seed, epoch + 1, 0)


class PackBuffers:
    """Arrays for ``Shard.pack(..., out=buffers)``, made once and used in turn; pinned where there is a CUDA device.

    What a call of ``pack`` returned is overwritten by the ``count``-th call after it. A loader that reads ``prefetch``
    batches ahead on ``workers`` threads needs prefetch + workers of them, since these may take their turns in another
    order than the batches', and one more for each batch that is still being copied to the device.
    May be called from several threads. Arrays grow, by half as much again, when a batch does not fit.
    """

    def __init__(self, count: int, pin: bool | None = None) -> None:
        """``pin``: None for pinned memory where there is a CUDA device."""
        if count < 1:
            raise InputError(f"buffers: found {count}, expected 1 or more")
        self.pin = torch.cuda.is_available() if pin is None else pin
        self._turns: deque[tuple[PackSizes, PackedPrompts] | None] = deque([None] * count)
        self._lock = threading.Lock()

    def __call__(self, sizes: PackSizes) -> PackedPrompts:
        with self._lock:
            kept = self._turns.popleft()
            if kept is None or not _holds(kept[0], sizes):
                room = _half_more(sizes)
                kept = room, room.arrays(self._new)
            self._turns.append(kept)
        return kept[1]

    def _new(self, length: int) -> np.ndarray:
        return torch.empty(length, dtype=torch.int32, pin_memory=self.pin).numpy()


def _holds(room: PackSizes, sizes: PackSizes) -> bool:
    have, want = ([s.requests, s.tokens, s.seen, *s.nodes] for s in (room, sizes))
    return len(have) == len(want) and all(h >= w for h, w in zip(have, want, strict=True))


def _half_more(sizes: PackSizes) -> PackSizes:
    def more(n: int) -> int:
        return n + n // 2

    return PackSizes(more(sizes.requests), more(sizes.tokens), more(sizes.seen), [more(n) for n in sizes.nodes])


def _mix(x: Any) -> Any:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
