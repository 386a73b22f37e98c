from collections import defaultdict
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.data import neighbours
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog
from negfast.data.neighbours import ContentNeighbours, co_dislike_neighbours, similarity_rows, soft_similarity

VALID = 50


def make_log(rng, n_users, n_items, n_events, last_day=60):
    """Random events, repeats and changes of mind included, some of them from VALID on."""
    user = np.sort(rng.integers(0, n_users, n_events))
    time = rng.integers(0, last_day * DAY, n_events)
    return EventLog(
        np.searchsorted(user, np.arange(n_users + 1)).astype(np.int64),
        rng.integers(0, n_items, n_events).astype(np.int32),
        rng.choice([DISLIKE, DISLIKE, LIKE, 0], n_events).astype(np.uint8),
        time[np.lexsort((time, user))].astype(np.int64),
        None,
        n_items,
    )


def dislikers(log, valid_day=VALID):
    """item -> users whose last like or dislike of it before the day is a dislike; an exposure tells nothing."""
    last = {}
    for user, item, feedback, time in zip(log.user, log.item, log.feedback, log.time, strict=True):
        if time < valid_day * DAY and feedback != EXPOSED:
            last[int(user), int(item)] = feedback
    sets = defaultdict(set)
    for (user, item), feedback in last.items():
        if feedback == DISLIKE:
            sets[item].add(user)
    return sets


def shrunk(users_i, users_j, without=None, at_least=2):
    users_i, users_j = users_i - {without}, users_j - {without}
    c = len(users_i & users_j)
    return c / (c + 5) * c / sqrt((len(users_i) + 3) * (len(users_j) + 3)) if c >= at_least else 0.0


def neighbours_reference(sets, n_items, top):
    lists = []
    for j in range(n_items):
        scores = sorted((-shrunk(sets[i], sets[j]), i) for i in range(n_items) if i != j)
        lists.append([i for score, i in scores[:top] if score < 0])
    return lists


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), top=st.integers(1, 12), n_events=st.integers(0, 400))
def test_counts_and_leave_one_out_against_sets(seed, top, n_events):
    rng = np.random.default_rng(seed)
    n_users, n_items = int(rng.integers(1, 20)), int(rng.integers(1, 16))
    log = make_log(rng, n_users, n_items, n_events)
    sets = dislikers(log)
    found = co_dislike_neighbours(log, VALID, top)
    assert found.ids.shape == found.count.shape == (n_items, top)
    for j, expected in enumerate(neighbours_reference(sets, n_items, top)):
        assert found.ids[j].tolist() == expected + [-1] * (top - len(expected))
        assert found.count[j, : len(expected)].tolist() == [len(sets[i] & sets[j]) for i in expected]
    users, items = rng.integers(0, n_users, 30), rng.integers(0, n_items, 30)
    ids, similarity = similarity_rows(found, users, items)
    for r, (u, j) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        expected = [shrunk(sets[i], sets[j], u) if i >= 0 else 0 for i in ids[r].tolist()]
        np.testing.assert_allclose(similarity[r], expected, rtol=1e-6)


def test_nothing_from_the_cut_on_is_counted():
    rng = np.random.default_rng()
    log = make_log(rng, 30, 10, 600)
    late = log.time >= VALID * DAY
    item = log.item.copy()
    item[late] = rng.integers(0, 10, late.sum())
    other = EventLog(log.user_offsets, item, log.feedback, log.time, None, 10)
    a, b = co_dislike_neighbours(log, VALID), co_dislike_neighbours(other, VALID)
    assert np.array_equal(a.ids, b.ids) and np.array_equal(a.count, b.count) and np.array_equal(a.pairs, b.pairs)
    c = co_dislike_neighbours(other, VALID + 10)
    assert not np.array_equal(a.count, c.count)


def test_copying_ones_own_history_pays_under_naive_counting_only():
    rng = np.random.default_rng()
    n_users, n_items = 60, 300
    log = make_log(rng, n_users, n_items, 1500, last_day=VALID)  # no taste: every dislike is drawn at random
    sets = dislikers(log)
    found = co_dislike_neighbours(log, VALID)
    naive, naive_of_two, ours = [], [], []
    for u in range(n_users):
        own = sorted(i for i in sets if u in sets[i])
        past, future = own[::2], own[1::2]
        for j in future:
            ids, similarity = similarity_rows(found, np.array([u]), np.array([j]))
            of = dict(zip(ids[0].tolist(), similarity[0].tolist(), strict=True))
            ours += [of.get(i, 0.0) for i in past]
            naive += [shrunk(sets[i], sets[j], at_least=1) for i in past]
            naive_of_two += [shrunk(sets[i], sets[j]) for i in past]
    assert min(naive) > 0  # every own dislike looks like a neighbour of every other
    assert np.mean(ours) < 0.1 * np.mean(naive) and np.mean(ours) < 0.5 * np.mean(naive_of_two)


def test_others_who_agree_are_counted():
    """Three users dislike both items 0 and 1; to one of them the other two still say so, to a fourth all three."""
    rows = [(u, i) for u in range(3) for i in (0, 1)]
    log = EventLog(
        np.array([0, 2, 4, 6, 6]),
        np.array([i for _, i in rows], dtype=np.int32),
        np.full(6, DISLIKE, dtype=np.uint8),
        np.zeros(6, dtype=np.int64),
        None,
        3,
    )
    ids, similarity = similarity_rows(co_dislike_neighbours(log, VALID), np.array([0, 3, 3]), np.array([0, 0, 2]))
    assert ids[:, 0].tolist() == [1, 1, -1]
    np.testing.assert_allclose(similarity[:, 0], [2 / 7 * 2 / 5, 3 / 8 * 3 / 6, 0], rtol=1e-6)
    assert not similarity[:, 1:].any()


@pytest.mark.parametrize(("n_items", "top"), [(1, 5), (40, 5), (4, 50)])
def test_content_neighbours(n_items, top):
    rng = np.random.default_rng()
    embedding = rng.normal(size=(n_items, 3)).astype(np.float32) * rng.uniform(0.1, 9, (n_items, 1)).astype(np.float32)
    if n_items > 4:
        embedding[3] = 0
        embedding[7] = embedding[5]
    ids, cosine = ContentNeighbours(embedding, 0.3, top)(np.arange(n_items))
    assert ids.shape == cosine.shape == (n_items, top) and ids.dtype == np.int32
    unit = (
        embedding.astype(np.float64) / np.maximum(np.linalg.norm(embedding.astype(np.float64), axis=1), 1e-30)[:, None]
    )
    truth = unit @ unit.T
    np.fill_diagonal(truth, -1)
    for j in range(n_items):
        expected = np.sort(truth[j][truth[j] >= 0.3])[::-1][:top]
        kept = ids[j] >= 0
        np.testing.assert_allclose(cosine[j][kept], expected, atol=1e-5)
        np.testing.assert_allclose(cosine[j][kept], truth[j, ids[j][kept]], atol=1e-5)
        assert not cosine[j][~kept].any() and len(set(ids[j][kept].tolist())) == kept.sum()
    if n_items > 4:
        assert not (ids == 3).any() and not (ids[3] >= 0).any() and ids[5, 0] == 7


def test_content_neighbours_in_cells_are_those_of_the_exact_search_where_all_cells_are_visited(monkeypatch):
    embedding = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    embedding[11] = 0
    items = np.array([7, 2999, 11, 7])
    exact = ContentNeighbours(embedding, 0.5)(items)
    monkeypatch.setattr(neighbours, "EXACT_ITEMS", 100)
    monkeypatch.setattr(neighbours, "ADDED_AT_ONCE", 512)
    monkeypatch.setattr(neighbours, "CELLS_VISITED", 10**4)
    ids, cosine = ContentNeighbours(embedding, 0.5)(items)
    assert (ids == exact[0]).all() and (ids[0] >= 0).any() and not (ids[2] >= 0).any()
    np.testing.assert_allclose(cosine, exact[1], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), with_content=st.booleans())
def test_soft_similarity_is_the_best_over_the_future(seed, with_content):
    rng = np.random.default_rng(seed)
    n_users, n_items = 12, 15
    found = co_dislike_neighbours(make_log(rng, n_users, n_items, 300), VALID, 6)
    content = ContentNeighbours(rng.normal(size=(n_items, 3)), 0.5, 4) if with_content else None
    requests = 5
    users = rng.integers(0, n_users, requests)
    futures = [rng.choice(n_items, rng.integers(0, 4), replace=False) for _ in range(requests)]
    offsets = np.cumsum([0] + [len(f) for f in futures])
    generated = np.stack([rng.choice(n_items, 7, replace=False) for _ in range(requests)]).astype(np.int32)
    generated[rng.random(generated.shape) < 0.1] = -1
    dislikes = np.concatenate(futures).astype(np.int32)
    got = soft_similarity(found, content, users, generated, offsets, dislikes)
    for r in range(requests):
        for k, i in enumerate(generated[r].tolist()):
            best = 0.0
            for j in futures[r].tolist() if i >= 0 else []:
                ids, similarity = similarity_rows(found, users[r : r + 1], np.array([j]))
                s = dict(zip(ids[0].tolist(), similarity[0].tolist(), strict=True)).get(i, 0.0)
                if s == 0 and content is not None:
                    near, cosine = content(np.array([j]))
                    s = dict(zip(near[0].tolist(), cosine[0].tolist(), strict=True)).get(i, 0.0)
                best = max(best, s)
            assert got[r, k] == pytest.approx(best, rel=1e-6)
