"""Evaluation sets against slow readings of their definitions."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog, history_ends
from negfast.data.split import Split, first_feedback, split_requests
from negfast.errors import InputError
from negfast.evaluate.sets import POOL, EvalSet, check_choosable, evaluation_set

MakeLog = Callable[..., EventLog]
FIRST_DAY = 15_000


def sets_of(log: EventLog, seed: int = 0) -> tuple[Split, EvalSet, EvalSet]:
    split = split_requests(log, 5, FIRST_DAY + 25, FIRST_DAY + 42)
    valid, test = (evaluation_set(log, split, name, seed) for name in ("valid", "test"))
    return split, valid, test


def events_of(log: EventLog) -> list[tuple[int, int, int, int]]:
    """(user, item, feedback, day) in the log's order."""
    return list(zip(log.user.tolist(), log.item.tolist(), log.feedback.tolist(), log.day.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_filter_events_are_first_feedback(random_log: MakeLog, seed: int) -> None:
    log = random_log(seed)
    split, valid, test = sets_of(log)
    first: dict[tuple[int, int], tuple[int, int]] = {}
    for user, item, feedback, day in events_of(log):
        if feedback != EXPOSED:
            first.setdefault((user, item), (day, feedback))
    for evalset, start, stop in ((valid, split.valid_day, split.test_day), (test, split.test_day, 10**9)):
        expected = sorted(
            (day, user, item, feedback == DISLIKE)
            for (user, item), (day, feedback) in first.items()
            if start <= day < stop
        )
        columns = (evalset.filter_moment // DAY, evalset.filter_user, evalset.filter_item, evalset.filter_dislike)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
        dislike_days = {user: [d for u, _, f, d in events_of(log) if u == user and f == DISLIKE] for user in range(40)}
        assert evalset.filter_past_dislike.tolist() == [
            any(d < day for d in dislike_days[user]) for day, user, *_ in expected
        ]
        assert evalset.past_dislike.tolist() == [
            any(d <= day for d in dislike_days[user])
            for user, day in zip(evalset.requests.user.tolist(), evalset.requests.day.tolist(), strict=True)
        ]


def test_the_filter_in_event_context(random_log: MakeLog) -> None:
    """The same events as in day context, each asked at its second."""
    log = random_log(0)
    split, _, by_day = sets_of(log)
    by_event = evaluation_set(log, split, "test", context="event")
    rows = {
        evalset.context: sorted(
            zip(evalset.filter_user, evalset.filter_item, evalset.filter_moment // DAY, strict=True)
        )
        for evalset in (by_day, by_event)
    }
    assert rows["day"] == rows["event"]
    for user, item, moment, past in zip(
        by_event.filter_user, by_event.filter_item, by_event.filter_moment, by_event.filter_past_dislike, strict=True
    ):
        own = slice(log.user_offsets[user], log.user_offsets[user + 1])
        assert moment in log.time[own][log.item[own] == item]
        assert past == ((log.feedback[own] == DISLIKE) & (log.time[own] < moment)).any()
    assert by_event.filter_past_dislike.sum() >= by_day.filter_past_dislike.sum()


def test_a_valid_split_that_chooses_nothing_is_refused(random_log: MakeLog) -> None:
    """Before the first step of training, not when weights are to be chosen and the score calibrated."""
    _, valid, _ = sets_of(random_log(0))
    check_choosable(valid)
    for dislike in (False, True):
        with pytest.raises(InputError, match="expected both kinds"):
            check_choosable(replace(valid, filter_dislike=np.full_like(valid.filter_dislike, dislike)))
    with pytest.raises(InputError, match="and 0 requests with a dislike ahead"):
        check_choosable(replace(valid, asked=valid.asked.only(np.zeros(0, np.int64))))


@pytest.mark.parametrize("seed", range(3))
def test_requests_next_dislikes_and_cold_items(random_log: MakeLog, seed: int) -> None:
    log = random_log(seed)
    split, valid, test = sets_of(log)
    for evalset, part in ((valid, split.valid), (test, split.test)):
        requests = evalset.requests
        assert len(requests) == part.has_dislikes.sum() > 0
        for row in range(len(requests)):
            user, day = int(requests.user[row]), int(requests.day[row])
            future = set(requests.dislikes[requests.dislike_offsets[row] : requests.dislike_offsets[row + 1]].tolist())
            own = [(i, f, d) for u, i, f, d in events_of(log) if u == user and d > day]
            assert evalset.next_dislike[row] == next(i for i, f, _ in own if f == DISLIKE and i in future)
    early = {item for _, item, _, day in events_of(log) if day < split.valid_day}
    assert np.flatnonzero(test.cold_item).tolist() == [i for i in range(log.n_items) if i not in early]


@pytest.mark.parametrize("seed", range(3))
def test_pools_hold_what_others_consumed_that_day(random_log: MakeLog, seed: int) -> None:
    log = random_log(seed, n_users=60 + 120 * (seed > 0), n_items=200, n_days=50, n_events=8000)
    _, _, test = sets_of(log, seed)
    events = events_of(log)
    consumed = {user: {i for u, i, _, _ in events if u == user} for user in range(log.n_users)}
    latest: dict[tuple[int, int], int] = {}
    for row in range(len(test.requests)):
        part = slice(test.requests.dislike_offsets[row], test.requests.dislike_offsets[row + 1])
        for item in test.requests.dislikes[part].tolist():
            latest[int(test.requests.user[row]), item] = row
    assert len(test.pool_items) + test.pools_dropped == len(latest)
    redrawn = 0
    for row, pool in zip(test.pool_request.tolist(), test.pool_items.tolist(), strict=True):
        user, target = int(test.requests.user[row]), pool[0]
        assert latest[user, target] == row
        day = next(d for u, i, f, d in events if (u, i, f) == (user, target, DISLIKE))
        others = Counter(i for _, i, _, d in events if d == day and i not in consumed[user])
        assert len(pool) == POOL and set(pool[1:]) <= set(others)
        if others.total() >= POOL - 1:
            assert not Counter(pool[1:]) - others  # never more often than there were events
        else:
            redrawn += 1
    assert redrawn == test.pools_redrawn
    assert redrawn > 0 if seed == 0 else redrawn < len(test.pool_items) // 2
    again, other = sets_of(log, seed)[2], sets_of(log, seed + 1)[2]
    assert (again.pool_items == test.pool_items).all() and (other.pool_items != test.pool_items).any()


def test_pool_draws_events_uniformly() -> None:
    """With 300 events of others on one day, each is among the 99 equally often (chi-square over 400 pools)."""
    popular, rare = [0] * 200, list(range(1, 101))
    day = FIRST_DAY + 45
    rows = [(1 + k, item, LIKE, day) for k, item in enumerate(popular + rare)]
    targets = list(range(101, 501))  # 400 users, each with a disliked item of their own
    for k, target in enumerate(targets):
        rows += [(400 + k, 501, LIKE, day - 1), (400 + k, target, DISLIKE, day)]
    rows += [(0, 501, LIKE, FIRST_DAY), (0, 502, DISLIKE, FIRST_DAY + 1)]
    rows += [(0, 503, LIKE, FIRST_DAY + 30), (0, 504, DISLIKE, FIRST_DAY + 31), (0, 501, LIKE, FIRST_DAY + 52)]
    user, item, feedback, days = np.array(sorted(rows, key=lambda row: (row[0], row[3]))).T
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=800))])
    log = EventLog(offsets, item.astype(np.int32), feedback.astype(np.uint8), days * DAY, None, 505)
    _, _, test = sets_of(log, seed=3)
    assert test.pool_items.shape == (400, POOL)
    drawn = np.bincount(test.pool_items[:, 1:].ravel(), minlength=505)
    # 300 events of the first users and 399 of the others' targets are eligible for each pool
    assert drawn[0] == pytest.approx(400 * 99 * 200 / 699, rel=0.03)
    expected = 400 * 99 / 699
    chi_square = ((drawn[1:101] - expected) ** 2 / expected).sum()
    assert 50 < chi_square < 160  # 100 degrees of freedom


def test_a_day_with_nobody_else_gives_no_pool() -> None:
    days = [0, 1, 30, 31, 45, 46, 52]
    log = EventLog(
        user_offsets=np.array([0, 7]),
        item=np.arange(7, dtype=np.int32),
        feedback=np.array([LIKE, DISLIKE, LIKE, DISLIKE, LIKE, DISLIKE, LIKE], dtype=np.uint8),
        time=(FIRST_DAY + np.array(days)) * DAY,
        value=None,
        n_items=7,
    )
    _, _, test = sets_of(log)
    assert test.pool_items.shape == (0, POOL) and test.pools_dropped == 1


def of_user(evalset: EvalSet, log: EventLog) -> dict[int, tuple[list[tuple[int, ...]], ...]]:
    """What is asked of each user: requests, filter events, and pools with the context's day."""
    found: dict[int, tuple[list[tuple[int, ...]], ...]] = {user: ([], [], []) for user in range(log.n_users)}
    requests = evalset.requests
    for row, user in enumerate(requests.user.tolist()):
        future = requests.dislikes[requests.dislike_offsets[row] : requests.dislike_offsets[row + 1]]
        marks = int(requests.day[row]), int(evalset.primary[row]), int(evalset.next_dislike[row])
        found[user][0].append((*marks, *future.tolist()))
    columns = evalset.filter_user, evalset.filter_moment, evalset.filter_item, evalset.filter_dislike
    for user, *event in zip(*(column.tolist() for column in columns), strict=True):
        found[user][1].append(tuple(event))
    for user, day, pool in zip(evalset.pool_user.tolist(), evalset.pool_day, evalset.pool_items, strict=True):
        found[user][2].append((int(day), *pool.tolist()))
    return found


def test_a_bound_that_the_split_keeps_changes_nothing(random_log: MakeLog) -> None:
    log = random_log(0)
    split, _, whole = sets_of(log)
    same = evaluation_set(log, split, "test", most=len(whole.requests))
    assert same.drawn_from is None and of_user(same, log) == of_user(whole, log)


def test_of_a_larger_split_users_are_drawn_whole(random_log: MakeLog) -> None:
    """All that the whole set asks of them, and no more; the same on any log where these users did the same."""
    log = random_log(1, n_users=150, n_events=6000)
    split, _, whole = sets_of(log)
    every = of_user(whole, log)
    drawn: dict[int, set[int]] = {}
    for most in (40, 100):
        part = evaluation_set(log, split, "test", most=most)
        assert part.drawn_from == {
            "requests": len(whole.requests),
            "users": len(set(whole.requests.user.tolist())),
            "filter_events": len(whole.filter_user),
        }
        drawn[most] = set(np.unique(np.append(part.requests.user, part.filter_user)).tolist())
        for user, asked in of_user(part, log).items():
            kept = every[user] if user in drawn[most] else ([], [], [])
            assert asked[:2] == kept[:2] and set(asked[2]) <= set(kept[2])
        counts = [len(every[user][0]) for user in drawn[most]]
        assert most <= len(part.requests) == sum(counts) < most + max(len(of[0]) for of in every.values())
        assert len(part.pool_items) == min(most * 2, sum(len(every[user][2]) for user in drawn[most]))
    assert drawn[40] < drawn[100]


def test_many_filter_events_bound_a_draw_too(random_log: MakeLog) -> None:
    log = random_log(0)
    split, _, whole = sets_of(log)
    most = len(whole.filter_user) // 40
    rare = replace(split, test=split.test.only(np.flatnonzero(split.test.has_dislikes)[:most]))
    part = evaluation_set(log, rare, "test", most=most)
    assert most * 20 <= len(part.filter_user) < len(whole.filter_user) and len(part.requests) < most
    none = replace(split, test=split.test.only(~split.test.has_dislikes))
    with pytest.raises(InputError, match=r"eval\.requests=5: the users drawn of test have no request with a dislike"):
        evaluation_set(log, none, "test", most=5)


def test_a_split_without_feedback_is_an_input_error(random_log: MakeLog) -> None:
    log = random_log(0)
    split = split_requests(log, 5, FIRST_DAY + 25, FIRST_DAY + 42)
    silent = EventLog(log.user_offsets, log.item, log.feedback * 0, log.time, None, log.n_items)
    with pytest.raises(InputError, match="test has no first like or dislike"):
        evaluation_set(silent, split, "test")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), data=st.data())
def test_history_ends_and_first_feedback(random_log: MakeLog, seed: int, data: st.DataObject) -> None:
    log = random_log(seed, n_users=6, n_items=8, n_days=12, n_events=data.draw(st.integers(1, 60)))
    user = data.draw(st.integers(0, 5))
    day = data.draw(st.integers(FIRST_DAY - 3, FIRST_DAY + 15))
    (end,) = history_ends(log, np.array([user]), np.array([day]))
    begin = log.user_offsets[user]
    assert end - begin == sum(u == user and d <= day for u, _, _, d in events_of(log))
    first: dict[tuple[int, int], int] = {}
    for row, (u, i, f, _) in enumerate(events_of(log)):
        if f != EXPOSED:
            first.setdefault((u, i), row)
    assert first_feedback(log).tolist() == sorted(first.values())
