"""Calibrated dislike probability of candidates."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from negfast.data.log import EventLog

MEANING = {  # of a score, by what is given
    "feedback": "P(dislike | the user gives feedback), calibrated on the first likes and dislikes of valid",
    "shown": "P(dislike | shown), calibrated on what was first shown on the days of valid",
}
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Scores:
    """Of E pairs."""

    probability: np.ndarray  # float64 [E], in [0, 1]; NaN where nothing is known
    abstain: np.ndarray  # bool [E]: nothing is known


@dataclass(frozen=True)
class FirstKnown:
    """Since when anything is known of users and items."""

    log: EventLog

    @cached_property
    def of_user(self) -> np.ndarray:
        """The time of each user's first event, int64 [U + 1], seconds; `NEVER` for one without, and for index -1."""
        starts, ends = self.log.user_offsets[:-1], self.log.user_offsets[1:]
        first = np.append(self.log.time, NEVER)[starts]
        return np.append(np.where(starts < ends, first, NEVER), NEVER)

    @cached_property
    def of_item(self) -> np.ndarray:
        """The time of each item's first like or dislike, int64 [I + 1], seconds; `NEVER` as above."""
        first = np.full(self.log.n_items + 1, NEVER)
        judged = self.log.judged
        np.minimum.at(first, self.log.item[judged], self.log.time[judged])
        return first

    def before(self, user: np.ndarray, item: np.ndarray, moment: int) -> np.ndarray:
        """Whether anything is known of pairs of indices (-1: not in the data set) before a moment (seconds), bool [E].

        The user has an event, or the item a like or dislike (negfast's choice)."""
        known = (self.of_user[user] < moment) | (self.of_item[item] < moment)
        return (user >= 0) & (item >= 0) & known
