"""A withdrawn dislike: before its undo everything is as it was known, after it as if there had been no dislike."""

import numpy as np
import pytest

from negfast.data.features import HistoryFeatures
from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, WITHDRAWN, EventLog
from negfast.data.neighbours import co_dislike_neighbours
from negfast.data.split import all_requests, first_feedback
from negfast.serve.profiles import feedback_matrices

USERS, ITEMS, DAYS, UNDONE = 12, 15, 30, 20


def log_of(rows: list[tuple[int, int, int, int]]) -> EventLog:
    """Of (user, day, item, feedback)."""
    user, day, item, feedback = (np.array(column) for column in zip(*sorted(rows), strict=True))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=USERS))])
    return EventLog(offsets, item.astype(np.int32), feedback.astype(np.uint8), day.astype(np.int64) * DAY, None, ITEMS)


@pytest.fixture(scope="module")
def logs() -> tuple[EventLog, EventLog, EventLog]:
    """The log whose withdrawals come on one day; the same without them; the same without what they take back."""
    rng = np.random.default_rng(3)
    rows = [
        (u, int(d), int(i), int(rng.choice([LIKE, DISLIKE])))
        for u in range(USERS)
        for i, d in zip(rng.permutation(ITEMS)[:10], np.sort(rng.integers(0, DAYS, 10)), strict=True)
    ]
    undone = [row for row in rows if row[1] < UNDONE and row[3] == DISLIKE and row[0] % 2]
    undos = [(user, UNDONE, item, WITHDRAWN) for user, _, item, _ in undone]
    assert len(undone) >= 10
    never = [(u, d, i, EXPOSED if (u, d, i, f) in undone else f) for u, d, i, f in rows]
    return log_of(rows + undos), log_of(rows), log_of(never)


def features(log: EventLog, day: int, rich: bool = False) -> np.ndarray:
    table = ItemTable([str(i) for i in range(ITEMS)], [""] * ITEMS, {"kind": [("ab"[i % 2],) for i in range(ITEMS)]})
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(USERS), np.arange(ITEMS)))
    of_log = HistoryFeatures(log, table, prior_rate=0.3, prior_value=0.0, context="day")
    known = of_log.rich(user, item, np.full(len(user), day * DAY))
    return known if rich else known[:, : of_log.n_full]


@pytest.mark.parametrize("day", [UNDONE - 1, UNDONE + 1, DAYS])
def test_what_is_known_changes_with_the_undo(logs, day):
    withdrawn, kept, never = logs
    same, other = (kept, never) if day < UNDONE else (never, kept)
    np.testing.assert_allclose(features(withdrawn, day), features(same, day), atol=1e-12)
    assert (features(withdrawn, day) != features(other, day)).any()
    for mine, expected in zip(feedback_matrices(withdrawn, day), feedback_matrices(same, day), strict=True):
        assert (mine != expected).nnz == 0
    pairs = [co_dislike_neighbours(log, day).pairs.tolist() for log in (withdrawn, same, other)]
    assert pairs[0] == pairs[1] != pairs[2]


def test_more_undos_than_feedback_of_late_are_numbers():
    """Five likes of long ago are taken back in a week without another event: recent counts are below zero."""
    rows = [(0, 1, item, LIKE) for item in range(5)] + [(0, 40, item, WITHDRAWN) for item in range(5)]
    rows += [(user, 2, item, DISLIKE) for user in range(1, USERS) for item in range(3)]
    known = features(log_of(rows), 42, rich=True)
    assert np.isfinite(known[:, :-3]).all()  # the last are days since an event, of which there may be none


def test_futures_and_labels_hold_what_happened(logs):
    """A dislike that stood at the end of its day was one; an undo is neither a like nor a dislike."""
    withdrawn, kept, _ = logs
    mine_judged, kept_judged = [
        (log.user[rows], log.item[rows]) for log in (withdrawn, kept) for rows in [first_feedback(log)]
    ]
    np.testing.assert_array_equal(mine_judged, kept_judged)
    mine, expected = all_requests(withdrawn, 7), all_requests(kept, 7)
    rows = np.isin(mine.user * 1000 + mine.day, expected.user * 1000 + expected.day)  # an undo makes a day active
    assert 0 < (~rows).sum() <= USERS
    np.testing.assert_array_equal(mine.take(rows).dislikes, expected.dislikes)
