"""Random logs for the tests of shards."""

from itertools import pairwise

import numpy as np

from negfast.data.log import EventLog


def random_log(rng: np.random.Generator, users: int, items: int, longest: int, times: int = 40) -> EventLog:
    """Histories with repeated items, changed feedback, equal and negative times; some users have
    none, and half of the logs withdrawals."""
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, longest + 1, users))])
    n = int(offsets[-1])
    time = rng.integers(-5, times, n)
    for a, b in pairwise(offsets):
        time[a:b].sort()
    popularity = rng.dirichlet(np.full(items, 0.3))
    item = rng.choice(items, n, p=popularity).astype(np.int32)
    odds = [0.6, 0.3, 0.1, 0.0] if rng.random() < 0.5 else [0.6, 0.2, 0.1, 0.1]
    return EventLog(offsets, item, rng.choice(4, n, p=odds).astype(np.uint8), time, None, items)
