"""The order in which tasks visit their rows."""

import numpy as np
import pytest

from negfast.train.order import epoch_rows


@pytest.mark.parametrize(("size", "count"), [(10, 3), (5, 7), (1, 1), (17, 17)])
def test_every_row_comes_once_an_epoch(size, count):
    steps = 4 * size // min(count, size) + 1
    rows = np.concatenate([epoch_rows(3, "titles", step, size, count) for step in range(steps)])
    for epoch in range(4):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_order_depends_on_seed_and_task_and_is_fixed():
    """A resumed run must meet the same order: these values may never change."""
    orders = [epoch_rows(*given, 0, 1000, 1000).tolist() for given in ((3, "titles"), (4, "titles"), (3, "verdict"))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0][:5] == [41, 141, 897, 174, 454]
