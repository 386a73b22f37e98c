"""Lists by taste: what prices keep off, what the lift compares, and whose lists they are."""

import numpy as np
import pytest
import torch

from negfast.data.log import DAY, EXPOSED, LIKE, EventLog
from negfast.model.choice import TrieChooser
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.taste import CAPS, LIFT_WEIGHT, Taste, kind_lifts, list_prices, popular_items, seen_before
from negfast.runtime.verdict import Candidates, candidate_logits
from negfast.sid.prior import NEXT_LIKE


def shares(scores: np.ndarray, places: int) -> np.ndarray:
    """The share of the lists that have each item among the first places."""
    first = np.argsort(-scores, axis=1)[:, :places]
    return np.bincount(first.ravel(), minlength=scores.shape[1]) / len(scores)


def small_log() -> EventLog:
    """Two users; items 0 to 4, of which 4 has no event."""
    item = np.array([0, 1, 1, 2, 3, 0], np.int32)
    time = np.array([1, 5, 9, 2, 5, 9], np.int64) * DAY + 60
    feedback = np.array([LIKE, EXPOSED, LIKE, LIKE, LIKE, LIKE], np.uint8)
    return EventLog(np.array([0, 3, 6]), item, feedback, time, None, 5)


@pytest.fixture(scope="module")
def engine(tiny_run):
    return RunFolder(tiny_run).finished_engine(None)


def test_prices_keep_every_item_off_too_many_lists():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(300, 120)) + np.linspace(6, 0, 120)  # the first items are first for nearly everybody
    assert max(shares(scores, places).max() / share for places, share in CAPS) > 2
    priced = scores - list_prices(scores)
    for places, share in CAPS:
        assert shares(priced, places).max() <= share + 1e-9


def test_prices_are_zero_where_tastes_differ():
    scores = np.random.default_rng(1).normal(size=(400, 500))
    assert not list_prices(scores).any()


def test_only_what_is_on_too_many_lists_has_a_price():
    scores = np.random.default_rng(2).normal(size=(400, 500))
    scores[:, 7] += 10
    assert list_prices(scores).nonzero()[0].tolist() == [7]


def test_items_that_were_seen_are_on_no_list():
    scores = np.full((100, 40), -np.inf)
    scores[:, :3] = np.random.default_rng(3).normal(size=(100, 3))
    scores[:50] = -np.inf  # these have seen everything
    assert not list_prices(scores)[3:].any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 1)])
def test_few_users_and_items_have_prices_of_zero(shape):
    assert list_prices(np.zeros(shape)).tolist() == [0.0] * shape[1]


def test_popular_items_are_those_of_late_and_never_of_later_days():
    log = small_log()
    assert popular_items(log, 5, 5, 4.0).tolist() == [1, 3, 2, 0]  # 1 and 3 on the day, 2 and 0 three and four before
    assert popular_items(log, 5, 5, 4.0, np.array([3])).tolist() == [1, 2, 0]
    assert popular_items(log, 9, 2, 1000.0).tolist() == [1, 0]  # both twice, 1 later than 0


def test_seen_items_are_those_with_any_event_before_the_moment():
    log, items = small_log(), np.array([3, 1, 0])
    seen = seen_before(log, np.array([1, 0, 1]), 5 * DAY + 60, items)
    assert seen.tolist() == [[False, False, False], [False, False, True], [False, False, False]]
    assert seen_before(log, np.array([1]), 5 * DAY + 61, items).tolist() == [[True, False, False]]


def test_the_lift_is_the_policy_against_the_community_prior(engine):
    users = np.array([3, 40, 77], np.int32)
    moments = (np.array([40, 50, 60]) + int(engine.log.day.min())) * DAY
    items = np.tile(np.arange(20, dtype=np.int32), 3)
    order = np.random.default_rng(0).permutation(60)
    asked = Candidates(np.repeat(users, 20), items, np.repeat(moments, 20))
    lifts = np.empty(60)
    lifts[order] = kind_lifts(engine, asked.take(order))
    found = lifts.reshape(3, 20)
    histories = engine.histories.build(users, moments)
    with torch.no_grad():
        hidden = histories.start(engine.policy, "next-like")
        root, rows = torch.zeros(3, dtype=torch.int64), torch.arange(3)
        chooser = TrieChooser(engine.chooser.trie, 1.0)
        place = (0, root, rows, histories.prior, NEXT_LIKE)
        policy = chooser.choose(engine.policy, hidden, *place).log_probs()
        prior = chooser.choose(None, None, *place).log_probs()
    ratio = (policy - prior).double().numpy()[:, engine.trie.codes[:20, 0].astype(int)]
    assert np.isfinite(ratio).all() and ratio.std(axis=1).min() > 1e-4  # it says something
    gap = found - ratio
    assert np.abs(gap - gap.mean(axis=1, keepdims=True)).max() < 1e-5


def test_lists_are_unseen_items_by_score_and_the_same_for_a_user_alone(engine):
    day = int(engine.log.day.max()) - 10
    taste = Taste(engine, day, excluded=np.array([5, 6]))
    users = np.array([9, 2, 110])
    items, scores = taste.lists(users, 12)
    for row, user in enumerate(users):
        listed = items[row]
        assert len(set(listed)) == 12 and not {5, 6} & set(listed)
        assert not seen_before(engine.log, np.array([user]), (day + 1) * DAY, listed).any()
        asked = Candidates(np.full(12, user, np.int32), listed, np.full(12, (day + 1) * DAY))
        price = dict(zip(taste.shown, taste.price, strict=True))
        p = 1 / (1 + np.exp(-candidate_logits(engine, asked)))
        expected = np.log(p) + LIFT_WEIGHT * kind_lifts(engine, asked) - [price[item] for item in listed]
        assert np.abs(expected - scores[row]).max() < 1e-4
        assert (np.diff(scores[row]) <= 0).all()
        alone = taste.lists(np.array([user]), 12)
        assert alone[0][0].tolist() == listed.tolist()


def test_short_lists_are_padded(engine):
    day = int(engine.log.day.max())
    every = np.arange(engine.log.n_items)
    items, scores = Taste(engine, day, excluded=every[3:]).lists(np.arange(engine.log.n_users), 4)
    seen = seen_before(engine.log, np.arange(engine.log.n_users), (day + 1) * DAY, every[:3])
    assert ((items >= 0).sum(1) == (~seen).sum(1)).all()
    assert (np.isfinite(scores) == (items >= 0)).all() and (items[:, 3] == -1).all()
