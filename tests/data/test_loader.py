"""Each row once an epoch, and the same rest of the stream from any state, for any number of ranks and workers."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.data.loader import Loader, LoaderState, Permutation
from negfast.errors import InputError

SIZES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**40)


@given(size=SIZES, seed=SEEDS, epoch=st.integers(0, 5))
def test_permutation_has_every_entry_once(size, seed, epoch):
    assert sorted(Permutation(size, seed, epoch)[np.arange(size)]) == list(range(size))


def test_permutation_is_fixed():
    """A resumed run must meet the same order on another machine: these values may never change."""
    assert Permutation(10, 0, 0)[np.arange(10)].tolist() == [7, 8, 6, 9, 4, 2, 5, 0, 3, 1]
    assert Permutation(10**9, 7, 3)[np.array([0, 1, 10**9 - 1])].tolist() == [832982036, 482619412, 746295249]


def test_permutation_looks_random():
    """Over many seeds every entry comes to every place equally often, and neighbours are independent."""
    size, seeds = 13, 4000
    orders = np.stack([Permutation(size, seed, 0)[np.arange(size)] for seed in range(seeds)])
    place_counts = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    pair_counts = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size * size)
    for counts, cells in ((place_counts, size * (size - 1)), (pair_counts[pair_counts > 0], size * (size - 1))):
        expected = counts.sum() / counts.size
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi2 - cells) < 6 * np.sqrt(2 * cells)
    long = Permutation(10**6, 1, 0)[np.arange(10**6)]
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.005
    assert abs(np.corrcoef(long, np.arange(10**6))[0, 1]) < 0.005


def stream(size: int, batch: int, state: LoaderState, world: int, workers: int = 1, steps: int | None = None):
    """Batches of all ranks, step by step, and the state after the last of them."""
    loaders = [Loader(size, batch, lambda rows: rows, state, rank, world, workers) for rank in range(world)]
    epochs = [iter(loader) for loader in loaders]
    taken = []
    while steps is None or len(taken) < steps:
        parts = [next(epoch, None) for epoch in epochs]
        if parts[0] is None:
            break
        taken.append(np.concatenate(parts))
    assert len({loader.state for loader in loaders}) == 1
    return taken, loaders[0].state


@settings(max_examples=60, deadline=None)
@given(
    size=SIZES,
    batch=st.integers(1, 70),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    workers=st.integers(1, 3),
    seed=SEEDS,
    data=st.data(),
)
def test_resumes_from_any_batch_with_other_ranks_and_workers(size, batch, worlds, workers, seed, data):
    whole, end = stream(size, batch, LoaderState(seed), 1)
    whole = np.concatenate(whole)
    assert sorted(whole) == list(range(size))
    assert end == LoaderState(seed, 1, 0)

    steps = data.draw(st.integers(0, -(-size // (batch * worlds[0]))))
    before, state = stream(size, batch, LoaderState(seed), worlds[0], workers, steps)
    rest, end = stream(size, batch, state, worlds[1], workers)
    assert np.concatenate([*before, *rest, np.empty(0, np.int64)]).tolist() == whole.tolist()
    assert end == LoaderState(seed, 1, 0)


def test_epochs_differ_and_follow_one_another():
    loader = Loader(50, 8, lambda rows: rows, LoaderState(3))
    first, second = np.concatenate(list(loader)), np.concatenate(list(loader))
    assert loader.state == LoaderState(3, 2, 0)
    assert first.tolist() != second.tolist()
    assert sorted(first) == sorted(second) == list(range(50))


def test_reads_ahead_in_order_and_passes_errors_on():
    started = []

    def read(rows: np.ndarray) -> int:
        started.append(len(started))
        time.sleep(0.02 * (len(started) % 2))  # later batches may be done first
        return int(rows[0])

    loader = Loader(40, 4, read, LoaderState(1), workers=3, prefetch=4)
    batches = iter(loader)
    first = next(batches)
    time.sleep(0.1)
    assert len(started) == 4  # the one given and what is read ahead of its use
    assert loader.state == LoaderState(1, 0, 4)
    order = Permutation(40, 1, 0)[np.arange(40)]
    assert [first, *batches] == order[::4].tolist()

    def fail(rows: np.ndarray) -> None:
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        next(iter(Loader(4, 2, fail, LoaderState(0))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2, "world_size": 2}, "found rank 2, expected 0 to 1"),
        ({"batch_size": 0}, "found batch size 0"),
        ({"state": LoaderState(0, 0, 11)}, "found position 11, expected 0 to 10"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    settings_ = {"size": 10, "batch_size": 2, "read": len, "state": LoaderState(0)} | arguments
    with pytest.raises(InputError, match=message):
        Loader(**settings_)
