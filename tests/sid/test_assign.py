from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.errors import InputError
from negfast.sid import assign
from negfast.sid.assign import assign_codes
from negfast.sid.quantize import encode, fit_rq_kmeans, reconstruction_error


def assert_nearest(vectors, codes, codebooks):
    """Every code is the nearest of its level, up to what float32 distances can tell apart."""
    for vector, row in zip(vectors.astype(np.float64), codes, strict=True):
        for code, codebook in zip(row, codebooks, strict=True):
            distances = ((vector - codebook[np.isfinite(codebook).all(1)]) ** 2).sum(1)
            assert distances[code] <= distances.min() + 1e-5
            vector = vector - codebook[code]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.integers(1, 3), codebook=st.integers(2, 12), n=st.integers(1, 60))
def test_quantiser(seed, levels, codebook, n):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, int(rng.integers(1, 9)))).astype(np.float32)
    sizes = [max(1, codebook - 1)] + [codebook] * (levels - 1)
    codebooks = fit_rq_kmeans(vectors, sizes, codebook, seed % 1000)
    filled = np.isfinite(codebooks).all(2)
    assert [np.flatnonzero(level).tolist() for level in filled] == [list(range(min(n, size))) for size in sizes]
    codes = encode(vectors, codebooks)
    assert_nearest(vectors, codes, codebooks)
    assert np.array_equal(codebooks, fit_rq_kmeans(vectors, sizes, codebook, seed % 1000), equal_nan=True)
    if sizes[0] >= n:  # a centroid for every point
        assert reconstruction_error(vectors, codes, codebooks) < 1e-6


def test_more_levels_leave_less_error():
    vectors = np.random.default_rng().normal(size=(400, 6)).astype(np.float32)
    codebooks = fit_rq_kmeans(vectors, [8] * 4, 8, 0)
    codes = encode(vectors, codebooks)
    errors = [reconstruction_error(vectors, codes[:, :level], codebooks[:level]) for level in range(5)]
    assert errors[0] == pytest.approx(1) and all(a > b + 0.02 for a, b in pairwise(errors))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.integers(1, 3), full=st.floats(0.05, 1))
def test_codes_are_distinct_even_when_every_leaf_is_needed(seed, levels, full):
    rng = np.random.default_rng(seed)
    codebook = int(rng.integers(2, 6))
    n = max(1, int(full * codebook**levels))
    clumps = rng.normal(size=(3, 4))
    vectors = (clumps[rng.integers(0, 3, n)] + rng.normal(0, 0.01, (n, 4))).astype(np.float32)
    codebooks = rng.normal(size=(levels, codebook, 4)).astype(np.float32)
    codes = assign_codes(vectors, codebooks)
    assert codes.dtype == np.uint16 and codes.max() < codebook
    assert len(np.unique(codes, axis=0)) == n


def test_without_collisions_nothing_moves():
    rng = np.random.default_rng()
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    codebooks = fit_rq_kmeans(vectors, [16] * 3, 16, 0)
    codes = encode(vectors, codebooks)
    distinct = np.unique(codes, axis=0, return_index=True)[1]
    assert np.array_equal(assign_codes(vectors[distinct], codebooks), codes[distinct])
    moved = (assign_codes(vectors, codebooks) != codes).any(1)
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
        got = total_cost(vectors, codebook, assign_codes(vectors, codebook[None])[:, 0])
        assert got == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("room", [1, 3])
def test_stable_assignment_of_large_groups(room):
    rng = np.random.default_rng()
    cost = rng.random((30, 30 // room))
    code = assign._stable(cost, room)
    counts = np.bincount(code, minlength=cost.shape[1])
    assert counts.max() <= room
    for item in range(30):  # no item would rather have a code that would rather have it
        for other in np.flatnonzero(cost[item] < cost[item, code[item]]):
            held = cost[code == other, other]
            assert len(held) == room and held.max() <= cost[item, other]


def test_large_groups_fall_back_to_stable(monkeypatch):
    rng = np.random.default_rng()
    vectors, codebooks = rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(1, 50, 3)).astype(np.float32)
    exact = assign_codes(vectors, codebooks)[:, 0]
    monkeypatch.setattr(assign, "LARGEST_EXACT", 100)
    stable = assign_codes(vectors, codebooks)[:, 0]
    assert len(set(stable.tolist())) == 40
    assert total_cost(vectors, codebooks[0], stable) >= total_cost(vectors, codebooks[0], exact)


def test_too_few_leaves():
    with pytest.raises(InputError, match="at most 9 items, found 10"):
        assign_codes(np.zeros((10, 2), dtype=np.float32), np.zeros((2, 3, 2), dtype=np.float32))
