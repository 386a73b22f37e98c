"""Random logs for the evaluation's tests."""

from collections.abc import Callable

import numpy as np
import pytest

from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog


@pytest.fixture
def random_log() -> Callable[..., EventLog]:
    """A maker of logs with repeated and changed feedback, exposures, popular items and idle users."""

    def make(
        seed: int,
        n_users: int = 40,
        n_items: int = 60,
        n_days: int = 60,
        n_events: int = 1500,
        values: bool = True,
    ) -> EventLog:
        rng = np.random.default_rng(seed)
        user = np.sort(rng.integers(0, n_users, n_events))
        item = (n_items * rng.random(n_events) ** 2).astype(np.int32)
        time = np.int64(15_000) * DAY + rng.integers(0, n_days * DAY, n_events)
        odds = rng.random(n_items)[item]
        feedback = np.where(rng.random(n_events) < odds / 2, DISLIKE, LIKE)
        feedback[rng.random(n_events) < 0.15] = EXPOSED
        order = np.lexsort((time, user))
        value = (rng.integers(1, 11, n_events) / 2).astype(np.float32) if values else None
        return EventLog(
            user_offsets=np.concatenate([[0], np.cumsum(np.bincount(user, minlength=n_users))]),
            item=item[order],
            feedback=feedback.astype(np.uint8)[order],
            time=time[order],
            value=value,
            n_items=n_items,
        )

    return make


@pytest.fixture
def random_items() -> Callable[..., ItemTable]:
    """Item tables with a many-valued, a numeric and a mostly missing attribute."""

    def make(seed: int, n_items: int = 60) -> ItemTable:
        rng = np.random.default_rng(seed)
        kinds = np.array(["action", "drama", "horror", "western"])
        return ItemTable(
            ids=[str(i) for i in range(n_items)],
            text=[""] * n_items,
            attributes={
                "genres": [tuple(kinds[rng.random(4) < 0.4].tolist()) for _ in range(n_items)],
                "year": [(str(rng.integers(1990, 2014)),) for _ in range(n_items)],
                "label": [("x",) if rng.random() < 0.1 else () for _ in range(n_items)],
            },
        )

    return make
