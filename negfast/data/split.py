"""Requests, their futures, and the split by time: who is asked about, when, and what came true.

A request (user, day) is the end of a UTC day on which the user was active: its context is every event up to
the last second of that day, its future the following ``horizon`` days. Definitions are those of the design,
section 2: the future dislikes F hold the distinct items that the user had no event with up to then and
dislikes within the horizon; the future likes P the same for likes; an item in both counts as F only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from negfast import _core
from negfast.data.log import BLOCK_EVENTS, DAY, DISLIKE, LIKE, EventLog
from negfast.errors import InputError

WEEK = 7  # days of a block of the primary test set
NEVER = np.iinfo(np.int64).max // 2  # a day after every other one; halved so that adding to it cannot overflow
F_AHEAD, P_AHEAD = 1, 2  # bits: a request has future dislikes, future likes


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
class UserDays:
    """R requests sorted by (day, user), whose futures are made of the users' histories when they are taken: all futures
    at once take more memory than the log.
    """

    log: EventLog
    horizon: int  # days
    user: np.ndarray  # int32 [R]
    day: np.ndarray  # int32 [R], days since 1970
    ahead: np.ndarray  # uint8 [R], F_AHEAD | P_AHEAD
    next_only: bool = False  # F holds the item disliked first alone, see `only_next`

    def __len__(self) -> int:
        return len(self.user)

    @property
    def has_dislikes(self) -> np.ndarray:
        """Whether F is non-empty, bool [R]."""
        return self.ahead & F_AHEAD > 0

    @property
    def moment(self) -> np.ndarray:
        """As `Requests.moment`."""
        return (self.day.astype(np.int64) + 1) * DAY

    def only(self, rows: np.ndarray) -> "UserDays":
        """Those at ``rows`` (ascending indices or a bool mask)."""
        return replace(self, user=self.user[rows], day=self.day[rows], ahead=self.ahead[rows])

    def take(self, rows: np.ndarray | None = None) -> Requests:
        """The requests at ``rows`` (indices or a bool mask) in the order given, all by default, with their futures."""
        rows = np.arange(len(self)) if rows is None else np.flatnonzero(rows) if rows.dtype == bool else rows
        users, owner = np.unique(self.user[rows], return_inverse=True)
        sizes = self.log.user_offsets[users + 1] - self.log.user_offsets[users]
        block_of = (np.cumsum(sizes) // BLOCK_EVENTS)[owner] if len(users) else owner
        order = np.argsort(block_of, kind="stable")
        parts = []
        for mine in np.split(order, np.flatnonzero(np.diff(block_of[order])) + 1):
            some, local = np.unique(self.user[rows[mine]], return_inverse=True)
            log, _ = self.log.of_users(some)
            every = all_requests(log, self.horizon) if len(log) else _no_requests()
            key = every.day.astype(np.int64) * len(some) + every.user  # ascending
            place = np.searchsorted(key, self.day[rows[mine]].astype(np.int64) * len(some) + local)
            found = every.take(place)
            found = only_next(log, found) if self.next_only else found
            parts.append(replace(found, user=some[found.user].astype(np.int32)))
        return _joined(parts).take(np.argsort(order)) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Split:
    """Every active user-day, also those with an empty future, split by time.

    Where valid and test begin is the same for all users, or each community's own (`negfast.data.log.Cuts`).
    """

    train: UserDays  # whose future ends before valid begins
    valid: UserDays  # whose context reaches into valid and whose future ends before test begins
    test: UserDays  # whose context reaches into test and whose future ends with the log
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
        _, day, ahead = request_days(log, self.horizon)
        self.active[:] += np.bincount(day - self.first, minlength=len(self.active))
        self.with_dislikes[:] += np.bincount(day[ahead & F_AHEAD > 0] - self.first, minlength=len(self.active))

    def parts(self, valid_day: int, test_day: int) -> dict[str, tuple[int, int]]:
        """Requests of train, valid and test, and how many of them have dislikes. Raises InputError as
        `split_requests` does."""
        masks = part_masks(np.arange(self.first, self.last + 1), self.horizon, valid_day, test_day, self.last)
        parts = {n: (int(self.active[mask].sum()), int(self.with_dislikes[mask].sum())) for n, mask in masks.items()}
        refuse_empty_parts(parts, self.horizon, self.first, self.last, valid_day, test_day)
        return parts


def request_days(log: EventLog, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The user and day of every request, int64 [R] in the order of both, and what its future holds, uint8 [R] of
    F_AHEAD | P_AHEAD: what `all_requests` says of them, without the items."""
    user, day, ahead = np.empty(len(log), np.int64), np.empty(len(log), np.int64), np.empty(len(log), np.uint8)
    found = _core.request_days(log.user_offsets, log.item, log.feedback, log.time, horizon, user, day, ahead)
    return user[:found], day[:found], ahead[:found]


def part_masks(
    day: np.ndarray, horizon: int, valid_day: int | np.ndarray, test_day: int | np.ndarray, last_day: int | np.ndarray
) -> dict[str, np.ndarray]:
    """Which requests of these days are of train, valid and test, bool; see `Split`. ``valid_day``, ``test_day`` and
    ``last_day`` are the same for all or those of each request."""
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
    if log.cuts is None:
        return part_masks(day, horizon, valid_day, test_day, last_day)
    days = (valid_day, test_day, max(last_day, test_day) + 1)
    valid, test, end = ((log.cut(until) // DAY).astype(np.int32)[user] for until in days)
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
    days = user_days(log, horizon)
    first_day, last_day = int(days.day[0]), int(days.day[-1])
    masks = user_part_masks(log, days.user, days.day, horizon, valid_day, test_day, last_day)
    parts = {name: days.only(mask) for name, mask in masks.items()}
    counts = {name: (len(part), int(part.has_dislikes.sum())) for name, part in parts.items()}
    refuse_empty_parts(counts, horizon, first_day, last_day, valid_day, test_day)
    return Split(**parts, valid_day=valid_day, test_day=test_day, horizon=horizon)


def user_days(log: EventLog, horizon: int) -> UserDays:
    """Every active user-day of the log, also where the log ends within the horizon; some users at a time."""
    blocks, first_day, last_day = [], int(log.time.min()) // DAY, int(log.time.max()) // DAY
    counts = np.zeros(last_day - first_day + 1, np.int64)  # requests of each day
    for first, block in log.blocks():
        user, day, ahead = request_days(block, horizon)
        day -= first_day
        order = np.argsort(day.astype(np.uint16), kind="stable")  # a radix sort; 65,536 days are 179 years
        of_day = np.bincount(day, minlength=len(counts))
        blocks.append(((user[order] + first).astype(np.int32), ahead[order], of_day))
        counts += of_day
    free = np.cumsum(counts) - counts  # the next place of each day
    users, aheads = np.empty(counts.sum(), np.int32), np.empty(counts.sum(), np.uint8)
    blocks.reverse()
    while blocks:
        user, ahead, of_day = blocks.pop()
        place = np.arange(len(user)) + np.repeat(free - (np.cumsum(of_day) - of_day), of_day)
        users[place], aheads[place] = user, ahead
        free += of_day
    return UserDays(log, horizon, users, np.repeat(np.arange(len(counts), dtype=np.int32) + first_day, counts), aheads)


def all_requests(log: EventLog, horizon: int) -> Requests:
    """Every active user-day of the log with its futures, also where the log ends within the horizon.

    With first day f of a user-item pair and first dislike day g, the item is in F(u, d) exactly when
    d < f and g <= d + horizon: nothing before f is a dislike, so g is the first one after d too.
    """
    user, day, *spans = _ahead(log, horizon)
    order = np.lexsort((user, day))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ragged: list[np.ndarray] = []
    for begin, end, item in spans:
        counts = np.maximum(end - begin, 0)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.repeat(begin, counts) + within
        ragged += _ragged(rank[rows], np.repeat(item, counts), len(user))
    return Requests(user[order].astype(np.int32), day[order].astype(np.int32), *ragged)


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
    return np.flatnonzero(log.first_judged)


def sample_pairs(user: np.ndarray, item: np.ndarray, most: int) -> np.ndarray:
    """Places of at most ``most`` of the user-item pairs, int64 ascending: all, or those of least hash (splitmix64).

    Whether a pair is drawn does not depend on the order of the pairs, and more pairs only push others out.
    """
    if len(user) <= most:
        return np.arange(len(user))
    return np.sort(np.argpartition(_pair_hash(user, item), most)[:most])


def draw_users(users: np.ndarray, bounds: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    """The ``users`` int [U] (distinct) of least hash, ascending: so many that the first of ``bounds`` is reached, all
    where none is. A bound is a count for each user, int [U], and where their sum ends the draw."""
    if all(counts.sum() <= most for counts, most in bounds):
        return users
    order = np.argsort(_pair_hash(users, np.zeros_like(users)))
    enough = [int(np.searchsorted(np.cumsum(counts[order]), most)) + 1 for counts, most in bounds]
    return np.sort(users[order[: min(enough)]])


def _pair_hash(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Of each pair, uint64; those of distinct pairs differ."""
    mixed = (user.astype(np.uint64) << np.uint64(32)) | item.astype(np.uint64)
    mixed += np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def first_dislike_events(log: EventLog, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """The event row of the first dislike of each (user, item), which must exist; of an item of F it is the one
    within the horizon, as nothing came before."""
    users, user = np.unique(user, return_inverse=True)
    theirs, row = log.of_users(users)
    rows = np.flatnonzero(theirs.feedback == DISLIKE)
    keys, first = np.unique(theirs.pair[rows], return_index=True)
    return row[rows[first[np.searchsorted(keys, user * log.n_items + item)]]]


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


class _Span(NamedTuple):
    """Pairs whose item is ahead of the requests begin:end in the order of (user, day), of none where end <= begin."""

    begin: np.ndarray  # int64
    end: np.ndarray  # int64
    item: np.ndarray  # int32


def _ahead(log: EventLog, horizon: int) -> tuple[np.ndarray, np.ndarray, _Span, _Span]:
    """User and day of every request, int64 [R] in the order of both, and of which of them each pair's item is in F, and
    in P; see `all_requests`."""
    days = log.day.astype(np.int64)
    low, span = int(days.min()) - horizon - 1, int(days.max() - days.min()) + horizon + 2
    key = log.user.astype(np.int64) * span + (days - low)
    opens = np.append(True, key[1:] != key[:-1])
    active, request = key[opens], np.cumsum(opens) - 1  # (user, day), ascending as the log is
    pair, row = log.by_pair()
    begins = np.append(True, pair[1:] != pair[:-1])
    number, feedback = np.cumsum(begins) - 1, log.feedback[row]
    first = request[row[begins]]  # before it, the item is unseen

    def from_horizon(kind: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs with feedback of the kind, and the first request within the horizon of the first such feedback."""
        rows = np.flatnonzero(feedback == kind)
        rows = rows[np.diff(number[rows], prepend=-1) > 0]
        return number[rows], np.searchsorted(active, key[row[rows]] - horizon)

    disliked, dislike_begin = from_horizon(DISLIKE)
    liked, like_begin = from_horizon(LIKE)
    like_end = first.copy()
    like_end[disliked] = np.minimum(dislike_begin, first[disliked])  # from there on it is in F
    item = log.item[row[begins]]
    return (
        active // span,
        active % span + low,
        _Span(dislike_begin, first[disliked], item[disliked]),
        _Span(like_begin, like_end[liked], item[liked]),
    )


def _no_requests() -> Requests:
    none = np.zeros(0, np.int32)
    return Requests(none, none, np.zeros(1, np.int64), none, np.zeros(1, np.int64), none)


def _joined(parts: Sequence[Requests]) -> Requests:
    """Requests one after the other, in no order."""
    ragged = []
    for name in ("dislike", "like"):
        counts = [np.diff(getattr(part, f"{name}_offsets")) for part in parts]
        ragged += [np.append(0, np.cumsum(np.concatenate(counts)))]
        ragged += [np.concatenate([getattr(part, f"{name}s") for part in parts])]
    user, day = (np.concatenate([getattr(part, name) for part in parts]) for name in ("user", "day"))
    return Requests(user, day, *ragged)


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
