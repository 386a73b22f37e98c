"""Sums before a day: added up in order within a key, to the bit."""

import numpy as np
import pytest

from negfast.data.running_sums import LONG, RunningSums


@pytest.mark.parametrize("keys", [1, 3, 400])
def test_sums_before_a_day(keys):
    rng = np.random.default_rng(keys)
    size = 3 * LONG
    key, day, columns = rng.integers(0, keys, size), rng.integers(5, 60, size), rng.normal(size=(size, 2))
    asked_key, asked_day = rng.integers(0, keys + 2, 200), rng.integers(0, 70, 200)
    found = RunningSums(key, day, columns).before(asked_key, asked_day)
    for k, d, sums in zip(asked_key, asked_day, found, strict=True):
        expected = np.zeros(2)
        for row in np.argsort(day, kind="stable"):
            if key[row] == k and day[row] < d:
                expected = expected + columns[row]
        assert np.array_equal(sums, expected)
