"""MovieTweetings as an event log and an item table, read without the package's own importer."""

import re
from collections.abc import Callable
from importlib.resources import files

import numpy as np
import pytest
import zstandard

from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog


def _lines(name: str) -> list[str]:
    data = files("negfast.data").joinpath(f"samples/movietweetings/{name}.zst").read_bytes()
    return zstandard.ZstdDecompressor().decompress(data).decode("utf-8").splitlines()


@pytest.fixture(scope="session")
def movietweetings() -> tuple[EventLog, ItemTable]:
    """The whole sample: rating <= 5 is a dislike, the rest are likes; items in the order of movies.dat."""
    movies = [line.split("::") for line in _lines("movies.dat")]
    year = [re.search(r"\((\d{4})\)$", title) for _, title, _ in movies]
    items = ItemTable(
        ids=[imdb for imdb, _, _ in movies],
        text=[title for _, title, _ in movies],
        attributes={
            "genres": [tuple(genre for genre in genres.split("|") if genre) for _, _, genres in movies],
            "year": [(match[1],) if match else () for match in year],
        },
    )
    row_of = {int(imdb): row for row, imdb in enumerate(items.ids)}
    user, imdb, rating, time = np.array([line.split("::") for line in _lines("ratings.dat")], dtype=np.int64).T
    item = np.array([row_of[i] for i in imdb], dtype=np.int32)
    users, user = np.unique(user, return_inverse=True)
    order = np.lexsort((time, user))
    log = EventLog(
        user_offsets=np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(users)))]),
        item=item[order],
        feedback=np.where(rating <= 5, DISLIKE, LIKE).astype(np.uint8)[order],
        time=time[order],
        value=rating.astype(np.float32)[order],
        n_items=len(items),
    )
    return log, items


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
