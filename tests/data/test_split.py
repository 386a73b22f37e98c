"""Requests and splits against a slow reading of the definitions, with repeated and changed feedback."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from negfast.data import log as log_module
from negfast.data import split as split_module
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog
from negfast.data.split import (
    Requests,
    all_requests,
    first_feedback,
    first_of_week,
    only_next,
    split_requests,
    user_days,
)
from negfast.errors import InputError

Event = tuple[int, int, int, int]  # user, item, feedback, time


def log_of(events: list[Event], n_users: int, n_items: int) -> EventLog:
    rows = sorted(events, key=lambda event: (event[0], event[3]))  # stable: ties stay in source order
    user, item, feedback, time = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=n_users))])
    return EventLog(offsets, item.astype(np.int32), feedback.astype(np.uint8), time, None, n_items)


def slow_requests(events: list[Event], horizon: int) -> list[tuple[int, int, list[int], list[int]]]:
    """Section 2 read literally: (day, user, F, P) of every active user-day in that order."""
    out = []
    for day, user in sorted({(time // DAY, user) for user, _, _, time in events}):
        own = [(item, feedback, time // DAY) for who, item, feedback, time in events if who == user]
        seen = {item for item, _, when in own if when <= day}
        window = [(i, f) for i, f, when in own if day < when <= day + horizon and i not in seen]
        dislikes = {item for item, feedback in window if feedback == DISLIKE}
        likes = {item for item, feedback in window if feedback == LIKE} - dislikes
        out.append((day, user, sorted(dislikes), sorted(likes)))
    return out


def as_tuples(requests: Requests) -> list[tuple[int, int, list[int], list[int]]]:
    d, p = requests.dislike_offsets, requests.like_offsets
    return [
        (
            int(requests.day[r]),
            int(requests.user[r]),
            requests.dislikes[d[r] : d[r + 1]].tolist(),
            requests.likes[p[r] : p[r + 1]].tolist(),
        )
        for r in range(len(requests))
    ]


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Event], int, int]:
    n_users, n_items, n_days = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 30))
    start = draw(st.sampled_from([0, 3, 15_800]))
    event = st.tuples(
        st.integers(0, n_users - 1),
        st.integers(0, n_items - 1),
        st.sampled_from([EXPOSED, LIKE, DISLIKE]),
        st.integers(start * DAY, (start + n_days) * DAY - 1) | st.integers(start, start + n_days - 1).map(DAY.__mul__),
    )
    return draw(st.lists(event, min_size=1, max_size=60)), n_users, n_items


@settings(max_examples=300, deadline=None)
@given(logs(), st.integers(1, 9))
def test_requests_are_the_definition(case: tuple[list[Event], int, int], horizon: int) -> None:
    events, n_users, n_items = case
    assert as_tuples(all_requests(log_of(events, n_users, n_items), horizon)) == slow_requests(events, horizon)


@settings(max_examples=200, deadline=None)
@given(logs(), st.integers(1, 9))
def test_only_the_next_dislike_is_left(case: tuple[list[Event], int, int], horizon: int) -> None:
    events, n_users, n_items = case
    log = log_of(events, n_users, n_items)
    own = list(zip(log.user.tolist(), log.day.tolist(), log.item.tolist(), log.feedback.tolist(), strict=True))
    expected = []
    for day, user, dislikes, likes in slow_requests(events, horizon):
        later = [item for who, when, item, f in own if who == user and when > day and f == DISLIKE and item in dislikes]
        expected.append((day, user, later[:1], likes))
    assert as_tuples(only_next(log, all_requests(log, horizon))) == expected


@settings(max_examples=200, deadline=None)
@given(logs(), st.integers(1, 5), st.data())
def test_split_is_the_definition(case: tuple[list[Event], int, int], horizon: int, data: st.DataObject) -> None:
    events, n_users, n_items = case
    days = [time // DAY for *_, time in events]
    assume(max(days) - min(days) >= 2)
    valid_day = data.draw(st.integers(min(days), max(days) - 1))
    test_day = data.draw(st.integers(valid_day + 1, max(days)))
    check_split(events, n_users, n_items, horizon, valid_day, test_day)


@pytest.mark.parametrize("seed", range(25))
def test_split_of_dense_logs(seed: int) -> None:
    """Enough events that no split is empty, with days right at the boundaries."""
    rng = np.random.default_rng(seed)
    n, horizon = 250, int(rng.integers(1, 5))
    events = list(zip(*(rng.integers(0, high, n).tolist() for high in (4, 60, 3, 30 * DAY)), strict=True))
    assert check_split(events, 4, 60, horizon, int(rng.integers(9, 12)), int(rng.integers(18, 22)))


def check_split(events: list[Event], n_users: int, n_items: int, horizon: int, valid_day: int, test_day: int) -> bool:
    """Compares with the slow reading; False where a split is empty and that was said."""
    days = [time // DAY for *_, time in events]
    reference = slow_requests(events, horizon)
    train = [r for r in reference if r[0] + horizon < valid_day]
    valid = [r for r in reference if valid_day <= r[0] and r[0] + horizon < test_day]
    test = [r for r in reference if test_day <= r[0] and r[0] + horizon <= max(days)]
    log = log_of(events, n_users, n_items)
    if not all(any(r[2] for r in part) for part in (train, valid, test)):
        with pytest.raises(InputError, match="none with a dislike"):
            split_requests(log, horizon, valid_day, test_day)
        return False
    split = split_requests(log, horizon, valid_day, test_day)
    assert [as_tuples(part.take()) for part in (split.train, split.valid, split.test)] == [train, valid, test]
    first: dict[tuple[int, int], int] = {}
    for row, (day, user, dislikes, _) in enumerate(test):
        if dislikes:
            first.setdefault((user, (day - test_day) // 7), row)
    assert np.flatnonzero(first_of_week(split.test.take(), test_day)).tolist() == sorted(first.values())
    return True


@settings(max_examples=50, deadline=None)
@given(logs(), st.integers(1, 9), st.data())
def test_take_keeps_the_futures(case: tuple[list[Event], int, int], horizon: int, data: st.DataObject) -> None:
    events, n_users, n_items = case
    requests = all_requests(log_of(events, n_users, n_items), horizon)
    rows = data.draw(st.lists(st.integers(0, len(requests) - 1), max_size=12))
    taken = requests.take(np.array(rows, dtype=np.int64))
    assert as_tuples(taken) == [as_tuples(requests)[r] for r in rows]
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(requests), max_size=len(requests))), dtype=bool)
    assert as_tuples(requests.take(mask)) == as_tuples(requests.take(np.flatnonzero(mask)))


def test_a_first_view_without_feedback_makes_an_item_seen() -> None:
    events = [
        (0, 0, EXPOSED, 5 * DAY),
        (0, 0, DISLIKE, 6 * DAY),
        (0, 1, LIKE, 7 * DAY),
        (0, 1, DISLIKE, 8 * DAY),
    ]
    requests = as_tuples(all_requests(log_of(events, 1, 2), 3))
    assert requests == [(5, 0, [1], []), (6, 0, [1], []), (7, 0, [], []), (8, 0, [], [])]
    assert as_tuples(all_requests(log_of(events, 1, 2), 2))[0] == (
        5,
        0,
        [],
        [1],
    )  # the dislike lies beyond day 7


@pytest.mark.parametrize(
    ("horizon", "valid_day", "test_day", "message"),
    [(0, 5, 9, "horizon: found 0"), (2, 9, 9, "not before"), (2, 5, 9, "train has 0 requests")],
)
def test_bad_settings_are_one_line(horizon: int, valid_day: int, test_day: int, message: str) -> None:
    log = log_of([(0, 0, DISLIKE, 8 * DAY), (0, 1, DISLIKE, 9 * DAY)], 1, 2)
    with pytest.raises(InputError, match=message) as error:
        split_requests(log, horizon, valid_day, test_day)
    assert "\n" not in str(error.value)
    none = np.zeros(0, np.int32)
    empty = EventLog(np.zeros(1, np.int64), none, none.astype(np.uint8), none.astype(np.int64), None, 0)
    with pytest.raises(InputError):
        split_requests(empty, 2, 5, 9)


@pytest.mark.parametrize("next_only", [False, True])
def test_some_users_at_a_time_are_all_of_them(monkeypatch: pytest.MonkeyPatch, next_only: bool) -> None:
    rng = np.random.default_rng()
    n, horizon = 400, 4
    events = list(zip(*(rng.integers(0, high, n).tolist() for high in (30, 20, 3, 40 * DAY)), strict=True))
    log = log_of(events, 35, 20)
    whole, first = all_requests(log, horizon), first_feedback(log)
    whole = only_next(log, whole) if next_only else whole
    for module in (log_module, split_module):
        monkeypatch.setattr(module, "BLOCK_EVENTS", 25)
    log = log_of(events, 35, 20)
    days = user_days(log, horizon)
    assert len(list(log.blocks())) > 10 and first_feedback(log).tolist() == first.tolist()
    assert days.has_dislikes.tolist() == whole.has_dislikes.tolist()
    assert (days.ahead & 2 > 0).tolist() == (np.diff(whole.like_offsets) > 0).tolist()
    rows = rng.integers(0, len(days), 50)
    assert as_tuples(replace(days, next_only=next_only).take(rows)) == as_tuples(whole.take(rows))
