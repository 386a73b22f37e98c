"""The event log in memory: every user's history, one array a column."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

EXPOSED, LIKE, DISLIKE, WITHDRAWN = 0, 1, 2, 3  # WITHDRAWN takes the user's like or dislike of the item back
DAY = 86_400  # seconds; days are counted in UTC
BLOCK_EVENTS = 1 << 20  # of the users that are looked at together


@dataclass(frozen=True)
class Cuts:
    """Where the parts of a log that is split within communities begin and end, for each user's community.

    Where code asks for a day, ``valid_day`` stands for the beginnings of valid, the next day for those of test and the
    one after for the ends. All three lie after the log's last day.
    """

    valid_day: int  # days since 1970
    moments: np.ndarray  # int64 [U, 3], seconds: valid begins, test begins, the community's last day is over

    def take(self, users: np.ndarray | slice) -> "Cuts":
        return Cuts(self.valid_day, self.moments[users])


@dataclass(frozen=True)
class EventLog:
    """Histories of U users over I items, sorted by (user, time, order in the source file).

    A user's events are the slice ``user_offsets[u]:user_offsets[u + 1]`` of the flat columns.
    Repeated and changed feedback is kept: the last like, dislike or withdrawal up to t is the one that counts at t.
    """

    user_offsets: np.ndarray  # int64 [U + 1]
    item: np.ndarray  # int32 [N], in [0, n_items)
    feedback: np.ndarray  # uint8 [N]: EXPOSED, LIKE, DISLIKE or WITHDRAWN
    time: np.ndarray  # int64 [N], seconds since 1970 in UTC
    value: np.ndarray | None  # float32 [N], a rating or the like; None where the source has none
    n_items: int
    cuts: Cuts | None = None  # of a log that is split within communities

    @property
    def n_users(self) -> int:
        return len(self.user_offsets) - 1

    @property
    def user(self) -> np.ndarray:
        """The user of every event, int32 [N]."""
        return np.repeat(np.arange(self.n_users, dtype=np.int32), np.diff(self.user_offsets))

    @property
    def day(self) -> np.ndarray:
        """The UTC day of every event, int32 [N], days since 1970."""
        return np.floor_divide(self.time, DAY, out=np.empty(len(self), np.int32), casting="unsafe")

    def moments(self, context: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The moment of every event, or of those at ``rows``, int64, seconds: its second in context "event", its day's
        start in "day".

        A question about an event sees the events of earlier moments, none of its own.
        """
        time = self.time[rows]
        return time if context == "event" else time // DAY * DAY

    def cut(self, day: int) -> np.ndarray:
        """The moment at which what lies before ``day`` ends for each user, int64 [U], seconds: the start of the day,
        or what `Cuts` says that the day stands for; nothing of valid or test lies before an earlier day."""
        if self.cuts is None:
            return np.full(self.n_users, day * DAY)
        part = min(max(day - self.cuts.valid_day, 0), 2)
        return np.minimum(self.cuts.moments[:, part], day * DAY)

    def before(self, day: int) -> np.ndarray:
        """Which events lie before ``day``, by `cut`, bool [N]: what is learned, counted or split asks here."""
        return self.time < (day * DAY if self.cuts is None else self.cut(day)[self.user])

    @property
    def judged(self) -> np.ndarray:
        """Whether an event is a like or a dislike, bool [N]."""
        return (self.feedback == LIKE) | (self.feedback == DISLIKE)

    def feedback_counts(self) -> dict[str, int]:
        """Events by feedback, as manifests and summaries name them; withdrawals only where there are any."""
        exposed, likes, dislikes, withdrawn = np.bincount(self.feedback, minlength=4).tolist()
        counts = {"dislikes": dislikes, "likes": likes, "exposed": exposed}
        return counts | {"withdrawn": withdrawn} if withdrawn else counts

    @property
    def pair(self) -> np.ndarray:
        """user * I + item of every event, int64 [N]."""
        return self.user.astype(np.int64) * self.n_items + self.item

    def by_pair(self, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`pair` of the events at ``rows`` int64, ascending (default: all), sorted, and the rows in that order; the
        events of a pair stay in theirs."""
        pair, order = sort_stably(self.pair if rows is None else self.pair[rows], self.n_users * self.n_items)
        return pair, order if rows is None else rows[order]

    @cached_property
    def first_judged(self) -> np.ndarray:
        """Whether an event is the first like or dislike of its user-item pair, bool [N]."""
        found = np.zeros(len(self), bool)
        for first, block in self.blocks():
            pair, row = block.by_pair(np.flatnonzero(block.judged))
            found[self.user_offsets[first] + row[np.diff(pair, prepend=-1) > 0]] = True
        return found

    def blocks(self) -> Iterator[tuple[int, "EventLog"]]:
        """The log some users at a time, those of about `BLOCK_EVENTS` events: the first of them, and their log, of
        views; users without events at the end are left out."""
        first, offsets = 0, self.user_offsets
        while offsets[first] < len(self):
            stop = max(int(np.searchsorted(offsets, offsets[first] + BLOCK_EVENTS, side="right")) - 1, first + 1)
            users, own = slice(first, stop), slice(offsets[first], offsets[stop])
            value = None if self.value is None else self.value[own]
            columns = self.item[own], self.feedback[own], self.time[own], value
            cuts = None if self.cuts is None else self.cuts.take(users)
            if own.stop > own.start:
                yield first, EventLog(offsets[first : stop + 1] - offsets[first], *columns, self.n_items, cuts)
            first = stop

    def of_users(self, users: np.ndarray) -> tuple["EventLog", np.ndarray]:
        """The log of ``users`` int [B] alone, who are 0 to B - 1 there, and the row of each of its events here."""
        begin, counts = self.user_offsets[users], self.user_offsets[users + 1] - self.user_offsets[users]
        offsets = np.append(0, np.cumsum(counts))
        rows = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], counts)
        value = None if self.value is None else self.value[rows]
        columns = self.item[rows], self.feedback[rows], self.time[rows], value
        return EventLog(offsets, *columns, self.n_items, None if self.cuts is None else self.cuts.take(users)), rows

    def repeats(self) -> np.ndarray:
        """Whether an event repeats an earlier one of its user and second in every column, bool [N]."""
        user, time = self.user, self.time
        together = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
        rows = np.flatnonzero(np.append(together, False) | np.append(False, together))
        value = np.zeros(len(self), np.float32) if self.value is None else self.value
        columns = [value[rows], self.feedback[rows], self.item[rows], time[rows], user[rows]]
        order = np.lexsort(columns)  # stable: the first of equal events stays the first
        same = np.ones(max(len(rows) - 1, 0), bool)
        for column in columns:
            left, right = column[order[:-1]], column[order[1:]]
            same &= (left == right) | ((left != left) & (right != right))  # a missing value is the same as another
        repeats = np.zeros(len(self), bool)
        repeats[rows[order[1:][same]]] = True
        return repeats

    def without(self, left_out: np.ndarray) -> "EventLog":
        """The log without the events of a mask, bool [N]; users and items keep their index."""
        kept = ~left_out
        offsets = np.concatenate([[0], np.cumsum(kept)])[self.user_offsets]
        value = None if self.value is None else self.value[kept]
        return EventLog(offsets, self.item[kept], self.feedback[kept], self.time[kept], value, self.n_items, self.cuts)

    def __len__(self) -> int:
        return len(self.item)


def sort_stably(keys: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """``keys`` int64 [N] of [0, bound) sorted, and the place that each had, int64; equal ones stay in their order."""
    bits = len(keys).bit_length()
    if bound >= 1 << (63 - bits):
        order = np.argsort(keys, kind="stable")
        return keys[order], order
    keys = keys << bits  # values sort several times as fast as places
    keys |= np.arange(len(keys))
    keys.sort()
    return keys >> bits, keys & ((1 << bits) - 1)


def events_before(log: EventLog, user: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Where a user's events before a moment (seconds) end in the flat columns, int64, one for each (user, moment)."""
    low, high = log.user_offsets[user], log.user_offsets[user + 1]
    while (open_ := low < high).any():
        middle = (low + high) // 2
        earlier = open_ & (log.time[np.minimum(middle, len(log) - 1)] < moment)
        low = np.where(earlier, middle + 1, low)
        high = np.where(open_ & ~earlier, middle, high)
    return low


def history_ends(log: EventLog, user: np.ndarray, day: np.ndarray) -> np.ndarray:
    """Where a user's events up to the end of a day end in the flat columns, int64, one for each (user, day)."""
    return events_before(log, user, (day.astype(np.int64) + 1) * DAY)


def past_dislikes(log: EventLog, user: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Dislikes of each user before each moment, int64."""
    dislikes = np.concatenate([[0], np.cumsum(log.feedback == DISLIKE)])
    return dislikes[events_before(log, user, moment)] - dislikes[log.user_offsets[user]]
