"""How far a user and an item deviate from what was to be expected of each other, and what of it is recent.

A user who disliked what everybody dislikes is no harsh judge; an item that only harsh judges saw is no bad item. So a
user's deviation is the mean excess over the items' own means at the time, and an item's the mean excess over what its
judges' deviations had led to expect; the sum of both predicts the pair. One of each for dislikes and, in a log with
values, for values (negfast's choice).
"""

from collections.abc import Sequence

import numpy as np

from negfast.data.log import DAY
from negfast.data.running_sums import RunningSums

PSEUDO_EVENTS = 5  # that deviate by nothing, mixed into every mean
RECENT_PSEUDO_EVENTS = 3
COUNT_SECONDS, RECENT_SECONDS = 7 * DAY, 21 * DAY  # of recent counts, of recent deviations

Kind = tuple[np.ndarray, np.ndarray, float]  # counts [M], sums [M], the mean of all


class Deviations:
    """Deviations before any moment, from events and their counted quantities."""

    def __init__(self, user: np.ndarray, item: np.ndarray, time: np.ndarray, kinds: Sequence[Kind]) -> None:
        """user, item, time (seconds) int [M] of events; for each kind what the event adds to its count and sum."""
        self.kinds = [_Kind(user, item, time, *kind) for kind in kinds]
        self.by_user = RunningSums(user, time, kinds[0][0][:, None])

    @property
    def width(self) -> int:
        return 6 * len(self.kinds) + 1

    def columns(self, user: np.ndarray, item: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """float64 [Q, width]: for each kind the user's and item's deviation, their sum, the recent ones of both, and
        how far the user is off the items' means on average, whatever the sign; then the log count of the user's recent
        events."""
        columns = [column for kind in self.kinds for column in kind.columns(user, item, moment)]
        recent = self.by_user.before(user, moment) - self.by_user.before(user, moment - COUNT_SECONDS)
        return np.stack([*columns, np.log1p(np.maximum(recent[:, 0], 0.0))], axis=1)


class _Kind:
    """Deviations of one quantity."""

    def __init__(
        self, user: np.ndarray, item: np.ndarray, time: np.ndarray, count: np.ndarray, total: np.ndarray, mean: float
    ) -> None:
        of_item = RunningSums(item, time, np.stack([count, total], 1)).before(item, time)
        item_mean = (of_item[:, 1] + PSEUDO_EVENTS * mean) / (of_item[:, 0] + PSEUDO_EVENTS)
        excess = total - count * item_mean
        self.by_user = RunningSums(user, time, np.stack([count, excess, count * np.abs(excess)], 1))
        expected = mean + _shrunk(self.by_user.before(user, time), PSEUDO_EVENTS)
        self.by_item = RunningSums(item, time, np.stack([count, total - count * expected], 1))

    def columns(self, user: np.ndarray, item: np.ndarray, moment: np.ndarray) -> list[np.ndarray]:
        of_user, of_item = self.by_user.before(user, moment), self.by_item.before(item, moment)
        lately_user = of_user - self.by_user.before(user, moment - RECENT_SECONDS)
        lately_item = of_item - self.by_item.before(item, moment - RECENT_SECONDS)
        all_time = [_shrunk(sums, PSEUDO_EVENTS) for sums in (of_user, of_item)]
        lately = [_shrunk(sums, RECENT_PSEUDO_EVENTS) for sums in (lately_user, lately_item)]
        return [*all_time, all_time[0] + all_time[1], *lately, of_user[:, 2] / (of_user[:, 0] + 1)]


def _shrunk(sums: np.ndarray, pseudo_events: int) -> np.ndarray:
    """The mean of a count and a sum [Q, 2...]. Withdrawals of older events make a recent count negative."""
    return sums[:, 1] / (np.maximum(sums[:, 0], 0.0) + pseudo_events)
