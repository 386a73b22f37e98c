"""The proof that generated items are admissible must itself notice every way of being wrong."""

from collections.abc import Callable

import numpy as np
import pytest

from negfast.data.log import EventLog
from negfast.data.split import Requests, all_requests
from negfast.evaluate.predictions import check_generated


@pytest.fixture
def case(random_log: Callable[..., EventLog]) -> tuple[EventLog, Requests, np.ndarray]:
    log = random_log(3, n_users=10, n_items=40, n_events=120)
    requests = all_requests(log, 5)
    rows = []
    for user, day in zip(requests.user, requests.day, strict=True):
        own = slice(log.user_offsets[user], log.user_offsets[user + 1])
        rows.append(np.setdiff1d(np.arange(40), log.item[own][log.day[own] <= day])[:12])
    return log, requests, np.stack(rows).astype(np.int32)


def test_admissible_items_pass(case: tuple[EventLog, Requests, np.ndarray]) -> None:
    log, requests, generated = case
    check_generated(log, requests, generated)
    generated[5, 4:] = -1
    check_generated(log, requests, generated)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "does not exist"),
        ("negative", "does not exist"),
        ("twice", "generated twice"),
        ("gap", "follows padding"),
        ("seen", "seen before"),
        ("seen today", "seen before"),
    ],
)
def test_faults_are_named(case: tuple[EventLog, Requests, np.ndarray], fault: str, message: str) -> None:
    log, requests, generated = case
    row = len(requests) - 1
    user, day = requests.user[row], requests.day[row]
    own = slice(log.user_offsets[user], log.user_offsets[user + 1])
    seen = log.item[own][log.day[own] <= day]
    generated[row, 7] = {
        "missing": 40,
        "negative": -2,
        "twice": generated[row, 2],
        "gap": generated[row, 7],
        "seen": seen[0],
        "seen today": seen[-1],
    }[fault]
    if fault == "gap":
        generated[row, 5] = -1
    with pytest.raises(ValueError, match=message) as error:
        check_generated(log, requests, generated)
    assert f"request {row} " in str(error.value)


def test_what_is_seen_later_may_be_generated(case: tuple[EventLog, Requests, np.ndarray]) -> None:
    log, requests, generated = case
    row = int(np.flatnonzero(requests.has_dislikes)[0])
    generated[row] = -1
    generated[row, 0] = requests.dislikes[requests.dislike_offsets[row]]
    check_generated(log, requests, generated)


def test_shape(case: tuple[EventLog, Requests, np.ndarray]) -> None:
    log, requests, generated = case
    with pytest.raises(ValueError, match="shape"):
        check_generated(log, requests, generated[1:])
