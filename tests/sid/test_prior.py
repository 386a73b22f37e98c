import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.data.log import DAY, DISLIKE, LIKE, EventLog
from negfast.sid.prior import NEXT_DISLIKE, NEXT_LIKE, DevicePrior, child_log_prior, decayed_mass
from negfast.sid.trie import SeenNodes, build_trie

from .reference import random_codes, seen_nodes_reference

FIRST = 15_764  # 2013-02-28


def random_log(rng, n_users, n_items, n_events, n_days):
    user = np.sort(rng.integers(0, n_users, n_events))
    time = FIRST * DAY + rng.integers(0, n_days * DAY, n_events)
    order = np.lexsort((time, user))
    return EventLog(
        user_offsets=np.searchsorted(user, np.arange(n_users + 1)).astype(np.int64),
        item=rng.integers(0, n_items, n_events).astype(np.int32),
        feedback=rng.integers(0, 3, n_events).astype(np.uint8),
        time=time[order].astype(np.int64),
        value=None,
        n_items=n_items,
    )


def make_case(rng, levels, dtype=torch.float64, device="cpu"):
    codebook = int(rng.integers(2, 9))
    n_items = int(rng.integers(2, min(codebook**levels, 50) + 1))
    trie = build_trie(random_codes(rng, n_items, levels, codebook), codebook)
    log = random_log(rng, 6, n_items, 300, 10)
    masses = [decayed_mass(log, feedback, 4.0, FIRST, FIRST + 9) for feedback in (DISLIKE, LIKE)]
    prior = DevicePrior.build(trie, masses[0], masses[1], FIRST, 0.01, device, dtype)
    return trie, masses, prior


def seen_of(rng, trie, requests):
    n = len(trie.leaf_item)
    return [rng.choice(n, rng.integers(0, n), replace=False).tolist() for _ in range(requests)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.integers(1, 4), single=st.booleans())
def test_walk_gives_each_unseen_item_its_share(seed, levels, single):
    rng = np.random.default_rng(seed)
    trie, masses, prior = make_case(rng, levels, torch.float32 if single else torch.float64)
    requests = int(rng.integers(1, 5))
    seen = seen_of(rng, trie, requests)
    if rng.random() < 0.5:  # exhaust a whole inner node of the first request
        node = int(rng.integers(trie.node_counts[1]))
        under = np.flatnonzero(trie.item_nodes[:, 0] == node).tolist()
        if len(set(seen[0]) | set(under)) < len(trie.leaf_item):
            seen[0] = sorted(set(seen[0]) | set(under))
    days = FIRST + rng.integers(0, 10, requests)
    packed = seen_nodes_reference(trie, seen)
    batch = prior.for_requests(days, SeenNodes.from_packed(packed, trie, "cpu"))
    device = trie.to("cpu")

    n_items = len(trie.leaf_item)
    rows = torch.arange(requests).repeat_interleave(n_items)  # every (request, item), walked from the root
    branch = torch.from_numpy(rng.integers(0, 2, requests))[rows]
    log_p = torch.zeros(len(rows), dtype=torch.float64)
    alive = torch.ones(len(rows), dtype=torch.bool)
    nodes = torch.zeros(len(rows), dtype=torch.int64)
    for level in range(levels):
        log_mass, valid = child_log_prior(device, batch, branch, level, nodes, rows)
        assert torch.isfinite(log_mass).all() and log_mass.shape == valid.shape == (len(rows), trie.codebook)
        code = torch.from_numpy(trie.codes[:, level].astype(np.int64)).repeat(requests)[:, None]
        alive &= valid.gather(1, code)[:, 0]
        log_p += log_mass.double().masked_fill(~valid, -torch.inf).log_softmax(1).gather(1, code)[:, 0]
        # rows whose path is cut walk on below pruned nodes, where nothing may be valid
        nodes = torch.from_numpy(trie.item_nodes[:, level].astype(np.int64)).repeat(requests)

    table = [masses[b][d - FIRST] + 0.01 for b in (0, 1) for d in days]
    for row in range(requests):
        weight = table[int(branch[row * n_items]) * requests + row].copy()
        weight[seen[row]] = 0
        got = torch.where(alive, log_p.exp(), 0)[row * n_items : (row + 1) * n_items]
        rtol, atol = (2e-4, 3e-7) if single else (1e-10, 1e-13)
        np.testing.assert_allclose(got, weight / weight.sum(), rtol, atol)
        assert alive[row * n_items : (row + 1) * n_items].tolist() == [i not in seen[row] for i in range(n_items)]


def test_child_masses_sum_to_the_parents():
    rng = np.random.default_rng()
    trie, masses, prior = make_case(rng, 3)
    for branch in (NEXT_DISLIKE, NEXT_LIKE):
        total = masses[branch].sum(1)
        np.testing.assert_allclose(prior.mass[0][branch].sum(1), total, rtol=1e-12)
    for level in (1, 2):
        for node in range(trie.node_counts[level]):
            begin, end = trie.first_child[level][node : node + 2]
            np.testing.assert_allclose(
                prior.mass[level][..., begin:end].sum(-1), prior.mass[level - 1][..., node], rtol=1e-12
            )


def test_days_outside_the_table_and_eps_are_refused():
    rng = np.random.default_rng()
    trie, masses, prior = make_case(rng, 2)
    seen = SeenNodes.from_packed(seen_nodes_reference(trie, [[], [0]]), trie, "cpu")
    for day in (FIRST - 1, FIRST + 10):
        with pytest.raises(ValueError, match=f"are outside {FIRST}..{FIRST + 9}"):
            prior.for_requests(np.array([FIRST, day]), seen)
    with pytest.raises(ValueError, match="eps"):
        DevicePrior.build(trie, masses[0], masses[1], FIRST, 0.0, "cpu")


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
