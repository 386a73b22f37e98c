"""Each row once an epoch, in an order that any step is reached in at once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from negfast.train.order import Permutation, epoch_rows

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


@given(size=st.integers(1, 300), count=st.integers(1, 70), seed=SEEDS, data=st.data())
def test_steps_visit_every_row_once_an_epoch(size, count, seed, data):
    """Whatever step is asked first: the rows of a step are those of a stream of permutations, cut into equal parts."""
    count = min(count, size)
    steps = -(-2 * size // count)
    stream = np.concatenate([epoch_rows(seed, "task", step, size, count) for step in range(steps)])
    assert sorted(stream[:size]) == sorted(stream[size : 2 * size]) == list(range(size))
    step = data.draw(st.integers(0, steps - 1))
    assert epoch_rows(seed, "task", step, size, count).tolist() == stream[step * count : (step + 1) * count].tolist()


def test_tasks_and_epochs_have_orders_of_their_own():
    first, second = (epoch_rows(3, "a", step, 50, 50).tolist() for step in (0, 1))
    assert first != second and first != epoch_rows(3, "b", 0, 50, 50).tolist()
