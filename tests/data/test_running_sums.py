"""Sums before a moment: added up in order within a key, to the bit."""

import numpy as np
import pytest

from negfast.data.running_sums import LONG, RunningSums


@pytest.mark.parametrize("keys", [1, 3, 400])
def test_sums_before_a_moment(keys):
    rng = np.random.default_rng(keys)
    size = 3 * LONG
    key, time, columns = rng.integers(0, keys, size), rng.integers(5, 60, size), rng.normal(size=(size, 2))
    asked_key, asked = rng.integers(0, keys + 2, 200), rng.integers(0, 70, 200)
    found = RunningSums(key, time, columns).before(asked_key, asked)
    for k, moment, sums in zip(asked_key, asked, found, strict=True):
        expected = np.zeros(2)
        for row in np.argsort(time, kind="stable"):
            if key[row] == k and time[row] < moment:
                expected = expected + columns[row]
        assert np.array_equal(sums, expected)


def test_large_keys_and_seconds_do_not_overflow():
    """A million users times a thousand authors, in seconds of ten years: more than 63 bits in one number."""
    key = np.array([10**12, 10**12, 10**12 + 1, 3])
    found = RunningSums(key, np.array([0, 3 * 10**8, 5, 7]), np.array([[1.0], [2.0], [4.0], [8.0]]))
    asked = np.array([10**12, 10**12, 10**12 + 1, 3, 4, 10**12 + 2])
    sums = found.before(asked, np.array([1, 4 * 10**8, 5, 8, 8, 8]))
    assert sums[:, 0].tolist() == [1.0, 3.0, 0.0, 8.0, 0.0, 0.0]
