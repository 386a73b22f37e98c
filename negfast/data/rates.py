"""How often an item, and a user, was disliked up to a day: smoothed rates, the prior of the verdict."""

import numpy as np

from negfast.data.log import DISLIKE, EXPOSED, EventLog

PSEUDO_EVENTS = 5.0  # smoothing, at the dislike rate of the events before the cut


class FeedbackRates:
    """Counts of likes and dislikes by item and by user, looked up at any day. Exposures without feedback do not count."""

    def __init__(self, log: EventLog, before_day: int) -> None:
        """``before_day``: the smoothing rate is the dislike rate of events before it (days since 1970)."""
        told = log.feedback != EXPOSED
        disliked = log.feedback[told] == DISLIKE
        day = log.day[told].astype(np.int64)
        early = day < before_day
        self.base_rate = float(disliked[early].mean()) if early.any() else 0.5
        self._span = int(day.max(initial=0)) + 2
        self._items = _Running(log.item[told].astype(np.int64) * self._span + day, disliked)
        self._users = _Running(log.user[told].astype(np.int64) * self._span + day, disliked)

    def features(self, users: np.ndarray, items: np.ndarray, days: np.ndarray) -> np.ndarray:
        """Float32 [E, 4]: logit of the item's rate, logit of the user's rate, log(1 + count) of both, up to each day.

        The logits are relative to the base rate's, so that an unknown item or user has 0; events of day ``days[e]``
        itself count.
        """
        columns = [self._look_up(self._items, items, days), self._look_up(self._users, users, days)]
        base = np.log(self.base_rate / (1 - self.base_rate)) if 0 < self.base_rate < 1 else 0.0
        logits, counts = [], []
        for count, dislikes in columns:
            rate = (dislikes + PSEUDO_EVENTS * self.base_rate) / (count + PSEUDO_EVENTS)
            rate = np.clip(rate, 1e-6, 1 - 1e-6)
            logits.append(np.log(rate / (1 - rate)) - base)
            counts.append(np.log1p(count))
        return np.stack([*logits, *counts], axis=1).astype(np.float32)

    def _look_up(self, running: "_Running", keys: np.ndarray, days: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = np.asarray(keys, dtype=np.int64) * self._span
        stop = start + np.clip(np.asarray(days, dtype=np.int64) + 1, 0, self._span)
        return running.between(start, stop)


class _Running:
    """Cumulative event and dislike counts over sorted keys."""

    def __init__(self, keys: np.ndarray, disliked: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self.dislikes = np.concatenate([[0], np.cumsum(disliked[order])])

    def between(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(events, dislikes) with key in [start, stop)."""
        first, last = np.searchsorted(self.keys, start), np.searchsorted(self.keys, stop)
        return last - first, self.dislikes[last] - self.dislikes[first]
