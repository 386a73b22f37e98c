"""Requests, their futures, and the split by time: who is asked about, when, and what came true.

A request (user, day) is the end of a UTC day on which the user was active: its context is every event up to
the last second of that day, its future the following ``horizon`` days. Definitions are those of the design,
section 2: the future dislikes F hold the distinct items that the user had no event with up to then and
dislikes within the horizon; the future likes P the same for likes; an item in both counts as F only.
"""

from dataclasses import dataclass, replace

import numpy as np

from negfast.data.log import DAY, DISLIKE, LIKE, EventLog
from negfast.errors import InputError

WEEK = 7  # days of a block of the primary test set
NEVER = np.iinfo(np.int64).max // 2  # a day after every other one; halved so that adding to it cannot overflow


@dataclass(frozen=True)
class Requests:
    """R requests sorted by (day, user), with their futures as ragged lists of item indices.

    The future dislikes of row r are ``dislikes[dislike_offsets[r]:dislike_offsets[r + 1]]``, ascending.
    """

    user: np.ndarray  # int32 [R]
    day: np.ndarray  # int32 [R], days since 1970; the context ends with this day
    dislike_offsets: np.ndarray  # int64 [R + 1]
    dislikes: np.ndarray  # int32, F(u, t)
    like_offsets: np.ndarray  # int64 [R + 1]
    likes: np.ndarray  # int32, P(u, t)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def has_dislikes(self) -> np.ndarray:
        """Whether F is non-empty, bool [R]."""
        return np.diff(self.dislike_offsets) > 0

    @property
    def moment(self) -> np.ndarray:
        """int64 [R], seconds: the context is every event before it."""
        return (self.day.astype(np.int64) + 1) * DAY

    def take(self, rows: np.ndarray) -> "Requests":
        """The requests at ``rows`` (indices or a bool mask), in the order given."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        dislike_offsets, dislikes = _take_ragged(self.dislike_offsets, self.dislikes, rows)
        like_offsets, likes = _take_ragged(self.like_offsets, self.likes, rows)
        return Requests(self.user[rows], self.day[rows], dislike_offsets, dislikes, like_offsets, likes)


@dataclass(frozen=True)
class Split:
    """Every active user-day, also those with an empty future, split by time.

    Where valid and test begin is the same for all users, or each community's own (`negfast.data.log.Cuts`).
    """

    train: Requests  # whose future ends before valid begins
    valid: Requests  # whose context reaches into valid and whose future ends before test begins
    test: Requests  # whose context reaches into test and whose future ends with the log
    valid_day: int  # days since 1970
    test_day: int
    horizon: int  # days


@dataclass(frozen=True)
class DayCounts:
    """How many users each day of a log has, the days from ``first`` (since 1970) on: enough to choose a split."""

    first: int
    active: np.ndarray  # int64 [D] users with an event on the day: its requests
    with_dislikes: np.ndarray  # int64 [D] requests whose F is not empty
    horizon: int  # days

    @property
    def last(self) -> int:
        return self.first + len(self.active) - 1

    @classmethod
    def empty(cls, first: int, last: int, horizon: int) -> "DayCounts":
        days = last - first + 1
        return cls(first, np.zeros(days, np.int64), np.zeros(days, np.int64), horizon)

    def add(self, log: EventLog) -> None:
        """Counts users of whom this is all that they did."""
        _, day, has_dislikes = request_days(log, self.horizon)
        self.active[:] += np.bincount(day - self.first, minlength=len(self.active))
        self.with_dislikes[:] += np.bincount(day[has_dislikes] - self.first, minlength=len(self.active))

    def parts(self, valid_day: int, test_day: int) -> dict[str, tuple[int, int]]:
        """Requests of train, valid and test, and how many of them have dislikes. Raises InputError as
        `split_requests` does."""
        masks = part_masks(np.arange(self.first, self.last + 1), self.horizon, valid_day, test_day, self.last)
        parts = {n: (int(self.active[mask].sum()), int(self.with_dislikes[mask].sum())) for n, mask in masks.items()}
        refuse_empty_parts(parts, self.horizon, self.first, self.last, valid_day, test_day)
        return parts


def request_days(log: EventLog, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The user and day of every request, int64 [R] in the order of both, and whether its F is not empty, bool [R]:
    what `all_requests` says of them, without the items."""
    low = int(log.day.min())
    day = log.day.astype(np.int64) - low
    span = int(day.max()) + 1
    key = log.user.astype(np.int64) * span + day
    active = key[np.append(True, key[1:] != key[:-1])]  # (user, day), ascending as the log is
    pair = log.user.astype(np.int64) * log.n_items + log.item
    disliked = np.flatnonzero(log.feedback == DISLIKE)
    pairs, first_dislike = np.unique(pair[disliked], return_index=True)
    first_dislike = day[disliked[first_dislike]]
    place = np.minimum(np.searchsorted(pairs, pair), max(len(pairs) - 1, 0))
    events = np.flatnonzero(pairs[place] == pair) if len(pairs) else disliked
    first = np.full(len(pairs), NEVER)
    np.minimum.at(first, place[events], day[events])
    # The item is ahead from `horizon` days before its first dislike to its first event; see `all_requests`.
    user = pairs // log.n_items * span
    begin = np.searchsorted(active, user + np.maximum(first_dislike - horizon, 0))
    end = np.searchsorted(active, user + first)
    some, size = end > begin, len(active) + 1
    opened = np.bincount(begin[some], minlength=size) - np.bincount(end[some], minlength=size)
    return active // span, active % span + low, np.cumsum(opened)[:-1] > 0


def part_masks(
    day: np.ndarray, horizon: int, valid_day: int | np.ndarray, test_day: int | np.ndarray, last_day: int | np.ndarray
) -> dict[str, np.ndarray]:
    """Which requests of these days are of train, valid and test, bool; see `Split`. ``valid_day``, ``test_day`` and
    ``last_day`` are the same for all or those of each request."""
    day = day.astype(np.int64)
    return {
        "train": day + horizon < valid_day,
        "valid": (valid_day <= day) & (day + horizon < test_day),
        "test": (test_day <= day) & (day + horizon <= last_day),
    }


def user_part_masks(
    log: EventLog, user: np.ndarray, day: np.ndarray, horizon: int, valid_day: int, test_day: int, last_day: int
) -> dict[str, np.ndarray]:
    """`part_masks` of requests (user, day), at the moments of `Cuts` where the log has some. The day that a moment lies
    in is enough, as contexts and futures end with a day."""
    days = (valid_day, test_day, max(last_day, test_day) + 1)
    valid, test, end = (log.cut(until)[user] // DAY for until in days)
    return part_masks(day, horizon, valid, test, end - 1)


def refuse_empty_parts(
    parts: dict[str, tuple[int, int]], horizon: int, first_day: int, last_day: int, valid_day: int, test_day: int
) -> None:
    """InputError where a part, (requests, requests with dislikes), has none with dislikes."""
    for name, (requests, with_dislikes) in parts.items():
        if with_dislikes == 0:
            raise InputError(
                f"split: {name} has {requests} requests and none with a dislike in the next {horizon} days; the log "
                f"covers {_date(first_day)} to {_date(last_day)}, valid starts {_date(valid_day)}, test "
                f"{_date(test_day)}"
            )


def split_requests(log: EventLog, horizon: int, valid_day: int, test_day: int) -> Split:
    """Makes the requests of a log and splits them at two days (days since 1970, UTC), or at the moments of `Cuts`.

    Requests whose horizon crosses a boundary belong to no split: no future of one split is another's context.

    Raises InputError when the days are out of order or a split has no request with a future dislike.
    """
    if horizon < 1:
        raise InputError(f"horizon: found {horizon} days, expected at least 1")
    if valid_day >= test_day:
        raise InputError(f"split: found valid day {valid_day} not before test day {test_day}")
    if len(log) == 0:
        raise InputError("event log: found no events, expected at least one")
    requests = all_requests(log, horizon)
    last_day = int(log.day.max())
    masks = user_part_masks(log, requests.user, requests.day, horizon, valid_day, test_day, last_day)
    parts = {name: requests.take(mask) for name, mask in masks.items()}
    counts = {name: (len(part), int(part.has_dislikes.sum())) for name, part in parts.items()}
    refuse_empty_parts(counts, horizon, int(log.day.min()), last_day, valid_day, test_day)
    return Split(**parts, valid_day=valid_day, test_day=test_day, horizon=horizon)


def all_requests(log: EventLog, horizon: int) -> Requests:
    """Every active user-day of the log with its futures, also where the log ends within the horizon.

    With first day f of a user-item pair and first dislike day g, the item is in F(u, d) exactly when
    d < f and g <= d + horizon: nothing before f is a dislike, so g is the first one after d too.
    """
    user, item, first, disliked, liked = _pairs(log)
    days = log.day.astype(np.int64)
    low, span = int(days.min()) - horizon - 1, int(days.max() - days.min()) + 2 * horizon + 3
    active = np.unique(log.user.astype(np.int64) * span + (days - low))  # (user, day) keys, ascending
    base = user * span - low  # key of day d of a pair's user is base + d

    def rows_between(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(request row, item) of every active day in [start, stop) of each pair; start may be NEVER."""
        begin = np.searchsorted(active, base + np.minimum(start, stop))
        counts = np.searchsorted(active, base + stop) - begin
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(begin, counts) + within, np.repeat(item, counts)

    dislike_rows = rows_between(disliked - horizon, first)
    like_rows = rows_between(liked - horizon, np.minimum(disliked - horizon, first))
    request_user, request_day = active // span, active % span + low
    order = np.lexsort((request_user, request_day))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    dislike_offsets, dislikes = _ragged(rank[dislike_rows[0]], dislike_rows[1], len(active))
    like_offsets, likes = _ragged(rank[like_rows[0]], like_rows[1], len(active))
    return Requests(
        user=request_user[order].astype(np.int32),
        day=request_day[order].astype(np.int32),
        dislike_offsets=dislike_offsets,
        dislikes=dislikes,
        like_offsets=like_offsets,
        likes=likes,
    )


def first_of_week(requests: Requests, start_day: int) -> np.ndarray:
    """Marks each user's first request with non-empty F in every 7-day block from ``start_day``, bool [R]."""
    rows = np.flatnonzero(requests.has_dislikes)  # sorted by day, so the first occurrence is the earliest
    week = (requests.day[rows] - start_day) // WEEK
    _, first = np.unique(np.stack([requests.user[rows], week]), axis=1, return_index=True)
    primary = np.zeros(len(requests), dtype=bool)
    primary[rows[first]] = True
    return primary


def first_feedback(log: EventLog) -> np.ndarray:
    """The event rows of the first like or dislike of each user-item pair, int64, ascending."""
    rows = np.flatnonzero(log.judged)
    _, first = np.unique(log.user[rows].astype(np.int64) * log.n_items + log.item[rows], return_index=True)
    return rows[np.sort(first)]


def sample_pairs(user: np.ndarray, item: np.ndarray, most: int) -> np.ndarray:
    """Places of at most ``most`` of the user-item pairs, int64 ascending: all, or those of least hash (splitmix64).

    Whether a pair is drawn does not depend on the order of the pairs, and more pairs only push others out.
    """
    if len(user) <= most:
        return np.arange(len(user))
    mixed = (user.astype(np.uint64) << np.uint64(32)) | item.astype(np.uint64)
    mixed += np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.sort(np.argpartition(mixed ^ (mixed >> np.uint64(31)), most)[:most])


def first_dislike_events(log: EventLog, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """The event row of the first dislike of each (user, item), which must exist; of an item of F it is the one
    within the horizon, as nothing came before."""
    rows = np.flatnonzero(log.feedback == DISLIKE)
    keys, first = np.unique(log.user[rows].astype(np.int64) * log.n_items + log.item[rows], return_index=True)
    return rows[first[np.searchsorted(keys, user.astype(np.int64) * log.n_items + item)]]


def next_dislikes(log: EventLog, requests: Requests) -> np.ndarray:
    """The item of F disliked first (of equal times the first in the log), int32 [R]; every F must be non-empty."""
    row = np.repeat(np.arange(len(requests)), np.diff(requests.dislike_offsets))
    event = first_dislike_events(log, requests.user[row], requests.dislikes)
    order = np.lexsort((event, row))
    return requests.dislikes[order[requests.dislike_offsets[:-1]]]


def only_next(log: EventLog, requests: Requests) -> Requests:
    """The same requests, F cut down to the item disliked first: the target of next-negative prediction."""
    some = requests.has_dislikes
    offsets = np.concatenate([[0], np.cumsum(some, dtype=np.int64)])
    return replace(requests, dislike_offsets=offsets, dislikes=next_dislikes(log, requests.take(some)))


def _pairs(log: EventLog) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The distinct pairs: user, item, and the days of the first event, dislike and like (NEVER if none)."""
    key, pair = np.unique(log.user.astype(np.int64) * log.n_items + log.item, return_inverse=True)
    first, disliked, liked = np.full((3, len(key)), NEVER)
    every = np.ones(len(log), bool)
    for days, rows in ((first, every), (disliked, log.feedback == DISLIKE), (liked, log.feedback == LIKE)):
        np.minimum.at(days, pair[rows], log.day[rows])
    return key // log.n_items, (key % log.n_items).astype(np.int32), first, disliked, liked


def _ragged(rows: np.ndarray, items: np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups items by row, ascending within a row: offsets int64 [n_rows + 1] and items int32."""
    offsets = np.zeros(n_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=n_rows), out=offsets[1:])
    return offsets, items[np.lexsort((items, rows))].astype(np.int32)


def _take_ragged(offsets: np.ndarray, values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = np.diff(offsets)[rows]
    taken = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(counts, out=taken[1:])
    index = np.arange(taken[-1]) + np.repeat(offsets[:-1][rows] - taken[:-1], counts)
    return taken, values[index]


def _date(day: int) -> str:
    return str(np.datetime64(day, "D"))
