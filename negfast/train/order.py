"""The order in which training visits rows: seeded permutations that are computed, not stored.

A Feistel network with cycle walking gives any place of a permutation at once. What a step visits depends on its number
alone, so a resumed run sees the same rows, with any number of ranks or threads.
"""

from typing import Any

import numpy as np

ROUNDS = 6  # of the Feistel network; four already pass for random, two more cost nothing here


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


def _mix(x: Any) -> Any:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
