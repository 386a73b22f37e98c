"""The published figures of the MovieTweetings sample."""

import numpy as np
import pytest

from negfast.data.items import ItemTable
from negfast.data.log import EventLog
from negfast.data.split import Split, split_requests

VALID_DAY, TEST_DAY = (int(np.datetime64(day).astype(int)) for day in ("2013-06-17", "2013-07-15"))


@pytest.fixture(scope="module")
def split(movietweetings: tuple[EventLog, ItemTable]) -> Split:
    return split_requests(movietweetings[0], 7, VALID_DAY, TEST_DAY)


def test_split_counts(split: Split) -> None:
    counts = [(len(part), int(part.has_dislikes.sum())) for part in (split.train, split.valid, split.test)]
    assert counts == [(38_442, 5_521), (8_342, 1_244), (17_182, 2_732)]
    assert split.test_primary.sum() == 1_604
    assert len(np.unique(split.test.user[split.test.has_dislikes])) == 894
