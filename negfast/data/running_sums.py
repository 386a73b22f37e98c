"""Sums of what happened before a day, asked by key and day."""

import numba
import numpy as np


class RunningSums:
    """Sums of columns over the events of a key on days before a given one, for any (key, day) asked.

    Sums run within a key, so an answer is the same to the last bit whatever came later or happened elsewhere.
    """

    def __init__(self, key: np.ndarray, day: np.ndarray, columns: np.ndarray) -> None:
        """key int64 [M] >= 0, day int [M], columns float64 [M, C]."""
        self.low, self.span = int(day.min()), int(day.max() - day.min()) + 2
        where = key.astype(np.int64) * self.span + (day - self.low)
        order = np.argsort(where, kind="stable")
        self.where = where[order]
        self.total = np.zeros((len(order) + 1, columns.shape[1]))  # total[m]: of m's key, with event m - 1 the last
        _sum_within(key[order], columns[order].astype(np.float64), self.total)

    def before(self, key: np.ndarray, day: np.ndarray) -> np.ndarray:
        """float64 [Q, C] for keys int [Q] and days int [Q]."""
        base = key.astype(np.int64) * self.span
        within = np.clip(day.astype(np.int64) - self.low, 0, self.span - 1)
        stop, start = np.searchsorted(self.where, base + within), np.searchsorted(self.where, base)
        return self.total[np.where(stop > start, stop, 0)]


@numba.njit(cache=True)
def _sum_within(key, columns, total):
    for m in range(len(key)):
        for c in range(columns.shape[1]):
            earlier = total[m, c] if m > 0 and key[m] == key[m - 1] else 0.0
            total[m + 1, c] = earlier + columns[m, c]
