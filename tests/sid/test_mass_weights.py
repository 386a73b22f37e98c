"""What makes the community prior: decayed masses by their definition, and weights that no others beat."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.data.log import DAY, DISLIKE, LIKE, EventLog
from negfast.data.split import Requests, all_requests
from negfast.sid.mass_weights import HALF_LIVES, MassWeights, decay_weights, decayed_mass, fit_weights, seen_items

from .test_prior import FIRST, random_log


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), half_life=st.floats(0.3, 30), start=st.integers(-3, 8))
def test_mass_is_the_sum_over_events(seed, half_life, start):
    rng = np.random.default_rng(seed)
    log = random_log(rng, 5, 7, 60, 12)
    first, last = FIRST + start, FIRST + start + int(rng.integers(0, 9))
    mass = decayed_mass(log, LIKE, half_life, first, last)
    assert mass.shape == (last - first + 1, 7) and mass.dtype == np.float64
    for row, today in enumerate(range(first, last + 1)):
        expected = np.zeros(7)
        for item, feedback, time in zip(log.item, log.feedback, log.time, strict=True):
            if feedback == LIKE and time < (today + 1) * DAY:
                expected[item] += 2.0 ** (-(today - time // DAY) / half_life)
        np.testing.assert_allclose(mass[row], expected, rtol=1e-12, atol=0)


def test_nothing_after_the_day_matters():
    rng = np.random.default_rng()
    log = random_log(rng, 6, 20, 400, 10)
    later = log.time >= (FIRST + 6) * DAY
    item, feedback = log.item.copy(), log.feedback.copy()
    item[later] = rng.integers(0, 20, later.sum())
    feedback[later] = DISLIKE
    shifted = EventLog(log.user_offsets, item, feedback, log.time, None, 20)
    before = decayed_mass(log, DISLIKE, 4.0, FIRST, FIRST + 9)
    after = decayed_mass(shifted, DISLIKE, 4.0, FIRST, FIRST + 9)
    assert np.array_equal(before[:6], after[:6])
    assert not np.array_equal(before[6:], after[6:])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_masses_are_weighted_sums_over_kinds_and_half_lives(seed):
    rng = np.random.default_rng(seed)
    log = random_log(rng, 5, 7, 60, 12)
    branches = rng.random((2, 2, 3)) * (rng.random((2, 2, 3)) < 0.7)
    weights = MassWeights((1.0, 3.0, 9.0), *(tuple(map(tuple, b.tolist())) for b in branches), eps=0.5)
    found = weights.masses(log, FIRST, FIRST + 9)
    for branch in range(2):
        expected = np.zeros((10, 7))
        for kind, of_kind in zip((DISLIKE, LIKE), branches[branch], strict=True):
            for half_life, weight in zip((1.0, 3.0, 9.0), of_kind, strict=True):
                expected += weight * decayed_mass(log, kind, half_life, FIRST, FIRST + 9)
        np.testing.assert_allclose(found[branch], expected, rtol=1e-12)
    assert MassWeights.from_json(json.loads(json.dumps(weights.to_json()))) == weights


def test_the_decay_prior_is_the_decay_of_each_branch():
    log = random_log(np.random.default_rng(), 5, 7, 60, 12)
    found = decay_weights(4.0, 0.01).masses(log, FIRST, FIRST + 9)
    for branch, kind in enumerate((DISLIKE, LIKE)):
        assert np.array_equal(found[branch], decayed_mass(log, kind, 4.0, FIRST, FIRST + 9))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_seen_items_are_those_of_events_up_to_the_day(seed):
    rng = np.random.default_rng(seed)
    log = random_log(rng, 5, 9, 60, 12)
    requests = all_requests(log, 3)
    owner, item = seen_items(log, requests)
    found = [[] for _ in range(len(requests))]
    for row, seen in zip(owner, item, strict=True):
        found[row].append(int(seen))
    for row, (user, day) in enumerate(zip(requests.user, requests.day, strict=True)):
        events = slice(*log.user_offsets[user : user + 2])
        assert sorted(found[row]) == sorted(set(log.item[events][log.day[events] <= day].tolist()))


def nll(log: EventLog, requests: Requests, mass: np.ndarray, futures: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean over requests with a future of the mean over it, of items drawn by ``mass`` [D, I] among the unseen."""
    offsets, items = futures
    total = []
    for row, (user, day) in enumerate(zip(requests.user, requests.day, strict=True)):
        future = items[offsets[row] : offsets[row + 1]]
        if len(future):
            events = slice(*log.user_offsets[user : user + 2])
            unseen = mass[day - FIRST].copy()
            unseen[log.item[events][log.day[events] <= day]] = 0.0
            total.append(-np.log(unseen[future] / unseen.sum()).mean())
    return float(np.mean(total))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_other_weights_make_the_futures_likelier(seed):
    rng = np.random.default_rng(seed)
    log = random_log(rng, 30, 12, 400, 20)
    requests = all_requests(log, 3)
    fitted = fit_weights(log, requests)
    kinds = (requests.dislike_offsets, requests.dislikes), (requests.like_offsets, requests.likes)
    columns = [decayed_mass(log, kind, h, FIRST, FIRST + 19) for kind in (DISLIKE, LIKE) for h in HALF_LIVES]
    columns = np.stack([np.ones_like(columns[0]), *columns])
    for of_branch, futures in zip((fitted.next_dislike, fitted.next_like), kinds, strict=True):
        weights = np.concatenate([[fitted.eps], *of_branch])
        best = nll(log, requests, np.tensordot(weights, columns, 1), futures)
        for _ in range(20):
            other = weights * rng.gamma(3.0, 1 / 3.0, len(weights)) + rng.choice([0.0, 0.01]) * rng.random(len(weights))
            assert nll(log, requests, np.tensordot(other, columns, 1), futures) > best - 1e-3


def test_the_weights_that_made_the_futures_are_found():
    """Dislikes drawn by .5 + 4-day dislikes + 2 x 1-day likes of all users, day by day."""
    rng = np.random.default_rng(3)
    n_items, per_day, days = 40, 60, 60
    events = [
        (user, FIRST, item, 1 + int(rng.random() < 0.5)) for user, item in enumerate(rng.integers(0, n_items, 60))
    ]
    user = len(events)
    mass = {(DISLIKE, 4.0): np.zeros(n_items), (LIKE, 1.0): np.zeros(n_items)}
    for kind, half_life in mass:
        np.add.at(mass[kind, half_life], [item for *_, item, feedback in events if feedback == kind], 1.0)
    requests = []
    for day in range(FIRST, FIRST + days):
        drawn = 0.5 + mass[DISLIKE, 4.0] + 2.0 * mass[LIKE, 1.0]
        for key in mass:
            mass[key] *= 2.0 ** (-1 / key[1])
        liked = rng.integers(0, n_items, 3)  # another few every day: else likes of long ago are as good as ``eps``
        for _ in range(per_day):  # a new user, active on the day, who dislikes or likes something on the next
            events.append((user, day, 0, 0))
            if rng.random() < 0.5:
                item = 1 + rng.choice(n_items - 1, p=drawn[1:] / drawn[1:].sum())
                requests.append((user, day, item))
                events.append((user, day + 1, item, DISLIKE))
                mass[DISLIKE, 4.0][item] += 1.0
            else:
                item = rng.choice(liked)
                events.append((user, day + 1, item, LIKE))
                mass[LIKE, 1.0][item] += 1.0
            user += 1
    order = sorted(range(len(events)), key=lambda row: events[row][:2])
    column = np.array([events[row] for row in order])
    log = EventLog(
        user_offsets=np.searchsorted(column[:, 0], np.arange(user + 1)).astype(np.int64),
        item=column[:, 2].astype(np.int32),
        feedback=column[:, 3].astype(np.uint8),
        time=column[:, 1] * DAY,
        value=None,
        n_items=n_items,
    )
    asked = np.array(requests)
    offsets = np.arange(len(asked) + 1)
    none = np.zeros(len(asked) + 1, np.int64)
    fitted = fit_weights(
        log, Requests(asked[:, 0], asked[:, 1], offsets, asked[:, 2].astype(np.int32), none, np.zeros(0, np.int32))
    )
    dislikes, likes = (dict(zip(HALF_LIVES, of_kind, strict=True)) for of_kind in fitted.next_dislike)
    assert sum(dislikes.values()) == pytest.approx(2.0, rel=0.4) and max(dislikes, key=dislikes.get) == 4.0
    assert sum(likes.values()) == pytest.approx(4.0, rel=0.4) and max(likes, key=likes.get) == 1.0
    assert not np.any(fitted.next_like)  # nobody asked likes anything


def test_items_that_never_get_an_event_keep_some_mass():
    """No future falls on an item without events: the likeliest weights would leave such items none at all."""
    rng = np.random.default_rng()
    users, items = 150, 10
    first, second = (np.stack([rng.permutation(items)[:4] for _ in range(users)]) for _ in range(2))
    item = np.concatenate([first, second], axis=1)
    days = np.sort(rng.integers(1, 30, (users, 8)), axis=1)
    days[:3] = 0  # some users tell of all active items before anybody is asked
    item[:3, :] = np.resize(np.arange(items), (3, 8))
    log = EventLog(
        user_offsets=np.arange(users + 1) * 8,
        item=item.ravel().astype(np.int32),
        feedback=rng.choice([LIKE, DISLIKE], users * 8).astype(np.uint8),
        time=(FIRST + days.ravel()) * DAY,
        value=None,
        n_items=40,
    )
    fitted = fit_weights(log, all_requests(log, 5))
    masses = fitted.masses(log, FIRST, FIRST + 30)
    assert np.isfinite(np.asarray(fitted.next_dislike)).all() and np.isfinite(masses.astype(np.float32)).all()


def test_the_fit_reads_no_event_after_its_requests():
    rng = np.random.default_rng()
    log = random_log(rng, 20, 15, 400, 20)
    early = all_requests(log, 3)
    early = early.take(early.day + 3 < FIRST + 12)
    later = log.time >= (FIRST + 12) * DAY
    item, feedback = log.item.copy(), log.feedback.copy()
    item[later] = rng.integers(0, 15, later.sum())
    feedback[later] = DISLIKE
    changed = EventLog(log.user_offsets, item, feedback, log.time, None, 15)
    assert fit_weights(log, early) == fit_weights(changed, early)
