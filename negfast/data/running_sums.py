"""Sums of what happened before a moment, asked by key and moment."""

import numpy as np

LONG = 256  # events of a key that are worth a call of their own


class RunningSums:
    """Sums of columns over the events of a key before a moment, for any (key, moment) asked.

    Sums run within a key, so an answer is the same to the last bit whatever came later or happened elsewhere.
    """

    def __init__(self, key: np.ndarray, time: np.ndarray, columns: np.ndarray) -> None:
        """key int64 [M] >= 0, time int64 [M] in seconds, columns float64 [M, C]."""
        self.low, self.span = int(time.min()), int(time.max() - time.min()) + 2
        order = np.lexsort((time, key))
        key = key[order]
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        self.keys = np.append(key[starts], -1)  # -1: no key, where one is asked that lies above all
        self.starts = np.append(starts, len(key))
        rank = np.repeat(np.arange(len(starts)), np.diff(self.starts))  # keys times seconds would overflow
        self.where = rank * self.span + (time[order] - self.low)
        self.total = np.zeros((len(order) + 1, columns.shape[1]))  # total[m]: of m's key, with event m - 1 the last
        _sum_within(key, columns[order].astype(np.float64), self.total)

    def before(self, key: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """float64 [Q, C] for keys int [Q] and moments int [Q]."""
        rank = np.searchsorted(self.keys[:-1], key)
        within = np.clip(moment.astype(np.int64) - self.low, 0, self.span - 1)
        stop = np.searchsorted(self.where, rank * self.span + within)
        some = (self.keys[rank] == key) & (stop > self.starts[rank])
        return self.total[np.where(some, stop, 0)]


def _sum_within(key: np.ndarray, columns: np.ndarray, total: np.ndarray) -> None:
    """total[m + 1]: the sum of ``columns`` [M, C] from the first row of m's key to m, added up in that order.

    ``key`` is sorted. Short runs of a key are added side by side, long ones each by a call: 20 ms for 500,000 events,
    where numba takes half a second to import, which `negfast score` would wait for.
    """
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    lengths = np.diff(starts, append=len(key))
    for start, length in zip(starts[lengths > LONG].tolist(), lengths[lengths > LONG].tolist(), strict=True):
        np.add.accumulate(columns[start : start + length], axis=0, out=total[start + 1 : start + length + 1])
    short = np.argsort(-lengths, kind="stable")[np.count_nonzero(lengths > LONG) :]
    starts, lengths = starts[short], lengths[short]  # longest first: a prefix of them has a row of any number
    total[starts + 1] = columns[starts]
    for row in range(1, int(lengths.max(initial=0))):
        at = starts[: np.searchsorted(-lengths, -row)] + row
        total[at + 1] = total[at] + columns[at]
