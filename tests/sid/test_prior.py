import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.data.log import DAY, DISLIKE, LIKE, EventLog
from negfast.sid.prior import DecayedMass, DevicePrior, child_log_prior
from negfast.sid.trie import SeenNodes, build_trie

from .reference import dense_mass, random_codes, seen_nodes_reference

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
    prior = DevicePrior.build(trie, log, 4.0, 0.01, device, dtype)
    days = prior.first_day, prior.first_day + prior.levels[0].days - 1
    return trie, [dense_mass(log, feedback, 4.0, *days) for feedback in (DISLIKE, LIKE)], prior


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
    days = prior.first_day + rng.integers(0, prior.levels[0].days, requests)
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
        log_mass, valid, children = child_log_prior(device, batch, branch, level, nodes, rows)
        assert torch.equal(children, device.children(level, nodes))
        assert torch.isfinite(log_mass).all() and log_mass.shape == valid.shape == (len(rows), trie.codebook)
        code = torch.from_numpy(trie.codes[:, level].astype(np.int64)).repeat(requests)[:, None]
        alive &= valid.gather(1, code)[:, 0]
        log_p += log_mass.double().masked_fill(~valid, -torch.inf).log_softmax(1).gather(1, code)[:, 0]
        # rows whose path is cut walk on below pruned nodes, where nothing may be valid
        nodes = torch.from_numpy(trie.item_nodes[:, level].astype(np.int64)).repeat(requests)

    table = [masses[b][d - prior.first_day] + 0.01 for b in (0, 1) for d in days]
    for row in range(requests):
        weight = table[int(branch[row * n_items]) * requests + row].copy()
        weight[seen[row]] = 0
        got = torch.where(alive, log_p.exp(), 0)[row * n_items : (row + 1) * n_items]
        rtol, atol = (2e-4, 3e-7) if single else (1e-10, 1e-13)
        np.testing.assert_allclose(got, weight / weight.sum(), rtol, atol)
        assert alive[row * n_items : (row + 1) * n_items].tolist() == [i not in seen[row] for i in range(n_items)]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_mass_of_every_node_on_every_day_is_the_dense_sum_over_its_leaves(dtype, rtol):
    rng = np.random.default_rng()
    trie, masses, prior = make_case(rng, 3, dtype)
    rows = torch.arange(prior.levels[0].days)
    for level in (1, 2, 3):
        nodes = torch.arange(trie.node_counts[level])[:, None]
        for branch, of_items in enumerate(masses):
            expected = np.zeros((trie.node_counts[level], len(rows)))
            np.add.at(expected, trie.item_nodes[:, level - 1], of_items.T)
            np.testing.assert_allclose(prior.mass(level, branch, rows, nodes), expected, rtol, 0)
            both = torch.full((len(nodes), 1), branch)
            assert torch.equal(prior.mass(level, both, rows, nodes), prior.mass(level, branch, rows, nodes))


def test_memory_follows_the_events_and_not_days_times_items():
    rng = np.random.default_rng()
    n_items = 20_000
    trie = build_trie(random_codes(rng, n_items, 3, 64), 64)
    prior = DevicePrior.build(trie, random_log(rng, 50, n_items, 3000, 2000), 4.0, 0.01, "cpu")
    assert prior.levels[0].days > 1900
    assert all(len(level.key) <= 3001 and len(level.mass) <= 3001 for level in prior.levels)


def test_days_outside_the_table_and_eps_are_refused():
    rng = np.random.default_rng()
    trie, _, prior = make_case(rng, 2)
    seen = SeenNodes.from_packed(seen_nodes_reference(trie, [[], [0]]), trie, "cpu")
    first = prior.first_day
    last = first + prior.levels[0].days - 1
    for day in (first - 1, last + 1):
        with pytest.raises(ValueError, match=f"are outside {first}..{last}"):
            prior.for_requests(np.array([first, day]), seen)
    with pytest.raises(ValueError, match="eps"):
        DevicePrior.build(trie, random_log(rng, 2, 5, 9, 3), 4.0, 0.0, "cpu")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), half_life=st.floats(0.3, 30))
def test_mass_is_the_sum_over_events(seed, half_life):
    rng = np.random.default_rng(seed)
    log = random_log(rng, 5, 7, 60, 12)
    first, last = FIRST - 1, FIRST + 11
    liked = log.feedback == LIKE
    keys = log.item[liked].astype(np.int64) * 13 + (log.day[liked] - first)
    mass = DecayedMass.build(keys, 13, half_life, dtype=torch.float64)
    found = mass.at(torch.arange(7), torch.arange(13)[:, None])
    np.testing.assert_allclose(found, dense_mass(log, LIKE, half_life, first, last), rtol=1e-12, atol=0)


def test_no_events_have_no_mass():
    mass = DecayedMass.build(np.zeros(0, np.int64), 5, 4.0)
    assert torch.equal(mass.at(torch.arange(3)[:, None], torch.arange(5)), torch.zeros(3, 5))


def test_nothing_after_the_day_matters():
    rng = np.random.default_rng()
    log = random_log(rng, 6, 20, 400, 10)
    day = (log.day - FIRST + 1).astype(np.int64)
    item = log.item.astype(np.int64)
    changed = np.where(day > 6, rng.integers(0, 20, len(item)), item)
    before, after = (
        DecayedMass.build(keys * 11 + day, 11, 4.0).at(torch.arange(20)[:, None], torch.arange(11))
        for keys in (item, changed)
    )
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])
