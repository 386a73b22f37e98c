from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.errors import InputError
from negfast.sid import assign, rqvae
from negfast.sid.assign import assign_codes, assign_new, digits, leaf_numbers
from negfast.sid.kmeans import fit_balanced, fit_rq_kmeans, squared_distances
from negfast.sid.quality import reconstruction_error, usage
from negfast.sid.quantize import Quantizer, encode
from negfast.sid.rqvae import fit_rq_vae


def assert_best(vectors, codes, quantizer):
    """Every code has the least distance plus price of its level, up to what float32 can tell apart."""
    for vector, row in zip(quantizer.project(vectors).astype(np.float64), codes, strict=True):
        for code, codebook, price in zip(row, quantizer.codebooks, quantizer.prices, strict=True):
            filled = np.isfinite(codebook).all(1)
            cost = ((vector - codebook[filled]) ** 2).sum(1) + price[filled]
            assert cost[code] <= cost.min() + 1e-5 * (1 + (vector**2).sum())
            vector = vector - codebook[code]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    levels=st.integers(1, 3),
    codebook=st.integers(2, 12),
    n=st.integers(1, 60),
    fit=st.sampled_from([fit_rq_kmeans, fit_balanced]),
)
def test_quantiser(seed, levels, codebook, n, fit):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, int(rng.integers(1, 9)))).astype(np.float32)
    sizes = [max(1, codebook - 1)] + [codebook] * (levels - 1)
    quantizer = fit(vectors, sizes, codebook, seed % 1000)
    filled = np.isfinite(quantizer.codebooks).all(2)
    assert [np.flatnonzero(level).tolist() for level in filled] == [list(range(min(n, size))) for size in sizes]
    codes = encode(vectors, quantizer)
    assert_best(vectors, codes, quantizer)
    again = fit(vectors, sizes, codebook, seed % 1000)
    assert np.array_equal(quantizer.codebooks, again.codebooks, equal_nan=True)
    assert np.array_equal(quantizer.prices, again.prices) and (quantizer.prices >= 0).all()
    if sizes[0] >= n:  # a centroid for every point
        assert reconstruction_error(vectors, codes, quantizer) < 1e-6


def clumps(rng, n, width=16):
    """Vectors of very unequal clumps: most of them in few."""
    centres = rng.normal(size=(40, width))
    share = 1 / np.arange(1, 41)
    return (centres[rng.choice(40, n, p=share / share.sum())] + rng.normal(0, 0.4, (n, width))).astype(np.float32)


def test_more_levels_leave_less_error():
    vectors = np.random.default_rng().normal(size=(400, 6)).astype(np.float32)
    quantizer = fit_rq_kmeans(vectors, [8] * 4, 8, 0)
    codes = encode(vectors, quantizer)
    errors = [
        reconstruction_error(vectors, codes[:, :level], Quantizer.plain(quantizer.codebooks[:level]))
        for level in range(5)
    ]
    assert errors[0] == pytest.approx(1) and all(a > b + 0.02 for a, b in pairwise(errors))


@pytest.mark.parametrize("seed", [65, None])  # with 65 the prices of a far clump were too small for float32
def test_balanced_codes_are_used_about_equally(seed):
    vectors = clumps(np.random.default_rng(seed), 3000)
    plain, balanced = (
        [level["perplexity"] for level in usage(encode(vectors, fit(vectors, [32] * 3, 32, 0)), 32)]
        for fit in (fit_rq_kmeans, fit_balanced)
    )
    assert min(balanced) > 30 > min(plain)


@pytest.fixture
def short_training(monkeypatch):
    monkeypatch.setattr(rqvae, "STEPS", 240)
    monkeypatch.setattr(rqvae, "WARM_UP", 60)


@pytest.mark.job
def test_rq_vae(short_training):
    """Same seed, same codes; they say most of what there is to say of a low-dimensional manifold, and none is dead."""
    rng = np.random.default_rng()
    hidden = clumps(rng, 1500, width=6)
    vectors = np.tanh(hidden @ rng.normal(size=(6, 48)) / 3).astype(np.float32)
    state = torch.random.get_rng_state()
    first, again = (fit_rq_vae(vectors, [15, 16, 16], 16, 3) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    codes = encode(vectors, first)
    assert np.array_equal(codes, encode(vectors, again))
    assert_best(vectors, codes, first)
    assert reconstruction_error(vectors, codes, first) < 0.15
    assert [level["used"] for level in usage(codes, 16)] == [15, 16, 16]
    stored = Quantizer.from_tensors({**first.tensors(), "embedding": vectors})
    assert np.array_equal(codes, encode(vectors, stored))


def test_codes_that_a_pass_left_unused_come_alive():
    """Each at an item of its own."""
    torch.manual_seed(0)
    data = torch.randn(401, 8)
    model = rqvae._Autoencoder(8)
    model.codebooks.append(torch.nn.Parameter(torch.randn(16, rqvae.LATENT)))
    used = torch.arange(16) < 6
    before = model.codebooks[0].detach().clone()
    rqvae._revive(model, [used], data, np.random.default_rng())
    table = model.codebooks[0].detach()
    assert torch.equal(table[used], before[used])
    latent = model.encoder(data).detach()
    nearest = torch.cdist(table[~used], latent, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 1e-4 and len(nearest.indices.unique()) == 10


def test_a_stored_quantiser_keeps_its_prices():
    vectors = clumps(np.random.default_rng(), 500)
    balanced = fit_balanced(vectors, [16] * 2, 16, 0)
    assert balanced.prices.any()
    stored = Quantizer.from_tensors(balanced.tensors())
    assert np.array_equal(encode(vectors, stored), encode(vectors, balanced))
    assert "prices" not in fit_rq_kmeans(vectors, [16] * 2, 16, 0).tensors()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.integers(1, 3), full=st.floats(0.05, 1))
def test_codes_are_distinct_even_when_every_leaf_is_needed(seed, levels, full):
    rng = np.random.default_rng(seed)
    codebook = int(rng.integers(2, 6))
    n = max(1, int(full * codebook**levels))
    clumps = rng.normal(size=(3, 4))
    vectors = (clumps[rng.integers(0, 3, n)] + rng.normal(0, 0.01, (n, 4))).astype(np.float32)
    quantizer = Quantizer.plain(rng.normal(size=(levels, codebook, 4)).astype(np.float32))
    codes = assign_codes(vectors, quantizer)
    assert codes.dtype == np.uint16 and codes.max() < codebook
    assert len(np.unique(codes, axis=0)) == n
    old = int(rng.integers(0, n + 1))
    later = assign_codes(vectors[old:], quantizer, taken=codes[:old])
    assert len(np.unique(np.concatenate([codes[:old], later]), axis=0)) == n


def test_later_items_take_the_free_leaf_that_costs_least():
    """Two levels, the second full but for some leaves under each prefix: an independent search finds the same."""
    rng = np.random.default_rng()
    quantizer = Quantizer.plain(rng.normal(size=(2, 4, 3)).astype(np.float32))
    taken = np.array([[a, b] for a in range(4) for b in range(4) if rng.random() < 0.6], dtype=np.uint16).reshape(-1, 2)
    for vector in rng.normal(size=(20, 1, 3)).astype(np.float32):
        free = [[b for b in range(4) if [a, b] not in taken.tolist()] for a in range(4)]
        first, second = quantizer.codebooks
        a = min((a for a in range(4) if free[a]), key=lambda a: ((vector[0] - first[a]) ** 2).sum())
        b = min(free[a], key=lambda b: ((vector[0] - first[a] - second[b]) ** 2).sum())
        assert assign_codes(vector, quantizer, taken).tolist() == [[a, b]]


@pytest.mark.parametrize("fit", [fit_rq_kmeans, fit_balanced, fit_rq_vae])
def test_new_items(fit, short_training):
    """As near as the old ones where there is room; cold ones in the cold prefix; nobody's code taken twice."""
    rng = np.random.default_rng()
    vectors = clumps(rng, 260)
    old, new = vectors[:200], vectors[200:]
    quantizer = fit(old, [7, 8, 8], 8, 0)
    taken = np.concatenate([assign_codes(old, quantizer), digits(7 * 64 + np.arange(3), 3, 8)])
    cold = rng.random(60) < 0.2
    codes = assign_new(new, cold, quantizer, taken)
    assert len(np.unique(np.concatenate([taken, codes]), axis=0)) == len(taken) + 60
    assert leaf_numbers(codes[cold], 8).tolist() == (7 * 64 + 3 + np.arange(cold.sum())).tolist()
    assert (codes[~cold, 0] < 7).all()
    first = encode(new[~cold], quantizer)[:, 0]
    elsewhere = first[codes[~cold, 0] != first]
    full = np.bincount(np.concatenate([taken, codes])[:, 0], minlength=8) == 64
    assert full[elsewhere].all()
    with pytest.raises(InputError, match="no room"):
        assign_new(new[:1].repeat(62, 0), np.ones(62, bool), quantizer, taken)


def test_new_items_of_random_codes():
    rng = np.random.default_rng()
    quantizer = Quantizer.plain(np.zeros((2, 8, 0), np.float32))
    taken = digits(rng.choice(64, 40, replace=False), 2, 8)
    codes = assign_new(np.zeros((24, 5)), np.zeros(24, bool), quantizer, taken, seed=4)
    assert sorted(leaf_numbers(np.concatenate([taken, codes]), 8).tolist()) == list(range(64))
    with pytest.raises(InputError, match="at most 64 items, found 65"):
        assign_new(np.zeros((25, 5)), np.zeros(25, bool), quantizer, taken, seed=4)


def test_without_collisions_nothing_moves():
    rng = np.random.default_rng()
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    quantizer = fit_rq_kmeans(vectors, [16] * 3, 16, 0)
    codes = encode(vectors, quantizer)
    distinct = np.unique(codes, axis=0, return_index=True)[1]
    assert np.array_equal(assign_codes(vectors[distinct], quantizer), codes[distinct])
    moved = (assign_codes(vectors, quantizer) != codes).any(1)
    prefix, counts = np.unique(codes, axis=0, return_counts=True)
    colliding = {tuple(row[:2]) for row in prefix[counts > 1].tolist()}
    assert all(tuple(codes[row, :2].tolist()) in colliding for row in np.flatnonzero(moved))


def total_cost(vectors, codebook, codes):
    return ((vectors - codebook[codes]) ** 2).sum()


def test_last_level_is_optimal():
    rng = np.random.default_rng()
    for _ in range(20):
        vectors = rng.normal(0, 0.3, (5, 3)).astype(np.float32)
        codebook = rng.normal(size=(6, 3)).astype(np.float32)
        best = min(total_cost(vectors, codebook, list(p)) for p in permutations(range(6), 5))
        got = total_cost(vectors, codebook, assign_codes(vectors, Quantizer.plain(codebook[None]))[:, 0])
        assert got == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("room", [1, 3])
def test_stable_assignment_of_large_groups(room):
    rng = np.random.default_rng()
    cost = rng.random((30, 30 // room))
    code = assign._stable(lambda rows: (cost, rows), len(cost), np.full(30 // room, room))
    counts = np.bincount(code, minlength=cost.shape[1])
    assert counts.max() <= room
    for item in range(30):  # no item would rather have a code that would rather have it
        for other in np.flatnonzero(cost[item] < cost[item, code[item]]):
            held = cost[code == other, other]
            assert len(held) == room and held.max() <= cost[item, other]


def test_large_groups_fall_back_to_stable(monkeypatch):
    rng = np.random.default_rng()
    vectors, codebooks = rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(1, 50, 3)).astype(np.float32)
    exact = assign_codes(vectors, Quantizer.plain(codebooks))[:, 0]
    monkeypatch.setattr(assign, "LARGEST_EXACT", 100)
    stable = assign_codes(vectors, Quantizer.plain(codebooks))[:, 0]
    assert len(set(stable.tolist())) == 40
    assert total_cost(vectors, codebooks[0], stable) >= total_cost(vectors, codebooks[0], exact)


def test_too_few_leaves():
    with pytest.raises(InputError, match="at most 9 items, found 10"):
        assign_codes(np.zeros((10, 2), dtype=np.float32), Quantizer.plain(np.zeros((2, 3, 2), dtype=np.float32)))


@pytest.mark.parametrize("seed", range(5))
def test_the_assignment_is_the_same_without_a_table_of_all_costs(seed, monkeypatch):
    """Against lists of preferences, with ties and codes that are full."""
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 3, (200, 2)).astype(np.float32)
    centroids = rng.integers(0, 3, (9, 2)).astype(np.float32)
    capacity = rng.multinomial(210, np.ones(9) / 9)
    capacity[0] = 0 if capacity.sum() - capacity[0] >= 200 else capacity[0]
    cost = squared_distances(points, centroids)
    preference, choice = np.argsort(cost, axis=1, kind="stable"), np.zeros(200, int)
    every = np.arange(200)
    while True:
        wanted = preference[every, choice]
        order = np.lexsort((cost[every, wanted], wanted))
        place = np.arange(200) - np.searchsorted(wanted[order], wanted[order])
        refused = order[place >= capacity[wanted[order]]]
        if not len(refused):
            break
        choice[refused] += 1
    for table in (1 << 24, 0):
        monkeypatch.setattr(assign, "LARGEST_TABLE", table)
        monkeypatch.setattr(assign, "BLOCK", 7)
        assert assign._within_room(points, centroids, np.zeros(9), capacity).tolist() == wanted.tolist()
