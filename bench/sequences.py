"""Synthetic feedback histories, seeded: for storage benchmarks, and long ones of equal length for `bench histories`.

Those of the storage benchmarks have 149 events a user on average, 3 % dislikes, and 100,000 items with 4-level semantic
IDs of nested, uneven clusters; Zipf popularity; a user draws 65 % of the events from three favourite clusters; sessions
of about 12 events over 60 days, most of them in the evening.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from negfast.data.dataset import Dataset, date_of
from negfast.data.log import DAY, DISLIKE, EXPOSED, EventLog
from negfast.prepare.build import SemanticIdSettings, SplitSettings, prepare
from negfast.prepare.events import EventMapping, ItemMapping
from negfast.prepare.rules import parse_rule

ITEMS, LEVELS, CODEBOOK = 100_000, 4, 256


@dataclass(frozen=True)
class Sequences:
    log: EventLog
    codes: np.ndarray  # uint16 [ITEMS, LEVELS]


def make_sequences(users: int, seed: int = 0) -> Sequences:
    """Histories of ``users`` users; the same arguments give the same data."""
    rng = np.random.default_rng(seed)
    codes = _hierarchical_codes(rng)
    popularity = rng.permutation(1 / np.arange(1, ITEMS + 1))
    mean, spread = 150, 0.9  # of the history length, log-normal
    lengths = np.exp(rng.normal(np.log(mean) - spread**2 / 2, spread, users)).clip(5, 4000).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    user = np.repeat(np.arange(users), lengths)
    item = _draw_items(rng, user, users, codes[:, 0], popularity)
    time = _draw_times(rng, user, offsets)
    order = np.lexsort((time, user))  # sessions of a user may overlap
    feedback = np.where(rng.random(len(user)) < 0.03, DISLIKE, EXPOSED).astype(np.uint8)
    return Sequences(EventLog(offsets, item[order], feedback, time[order], None, ITEMS), codes)


def _hierarchical_codes(rng: np.random.Generator) -> np.ndarray:
    """Every prefix has its own Dirichlet distribution of the next code; the last code makes items distinct."""
    codes = np.zeros((ITEMS, LEVELS), dtype=np.uint16)
    prefix = np.zeros(ITEMS, dtype=np.int64)
    for level, concentration in enumerate((0.6, 0.12, 0.12)):
        for rows in _groups(prefix):
            codes[rows, level] = rng.choice(CODEBOOK, len(rows), p=rng.dirichlet(np.full(CODEBOOK, concentration)))
        prefix = prefix * CODEBOOK + codes[:, level]
    for rows in _groups(prefix):
        repeats = -(-len(rows) // CODEBOOK)
        codes[rows, LEVELS - 1] = np.concatenate([rng.permutation(CODEBOOK) for _ in range(repeats)])[: len(rows)]
    return codes


def _groups(key: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(key, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(key[order])) + 1)


def _draw_items(
    rng: np.random.Generator, user: np.ndarray, users: int, cluster: np.ndarray, popularity: np.ndarray
) -> np.ndarray:
    """One inverse-CDF draw per event, over all items or over one favourite cluster of the user."""
    by_cluster = np.argsort(cluster, kind="stable")
    cdf = np.concatenate([[0], np.cumsum(popularity[by_cluster])])
    bounds = cdf[np.searchsorted(cluster[by_cluster], np.arange(CODEBOOK + 1))]
    weight = np.diff(bounds)
    favourites = rng.choice(CODEBOOK, (users, 3), p=weight / weight.sum())
    chosen = favourites[user, rng.integers(0, 3, len(user))]
    anywhere = rng.random(len(user)) >= 0.65
    low = np.where(anywhere, 0, bounds[chosen])
    high = np.where(anywhere, cdf[-1], bounds[chosen + 1])
    place = np.searchsorted(cdf, low + (high - low) * rng.random(len(user)), side="right") - 1
    return by_cluster[place.clip(0, ITEMS - 1)].astype(np.int32)


def _draw_times(rng: np.random.Generator, user: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Seconds; a session starts with probability 1/12, its events follow with log-normal gaps, median 40 s."""
    starts = rng.random(len(user)) < 1 / 12
    starts[offsets[:-1]] = True
    session = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)
    hour = rng.normal(19, 4, len(first)).clip(0, 23.99)
    begin = rng.integers(0, 60, len(first)) * DAY + (hour * 3600).astype(np.int64)
    begin = begin[np.lexsort((begin, user[first]))]
    gap = np.exp(rng.normal(np.log(40), 1, len(user))).astype(np.int64) + 1
    gap[first] = 0
    elapsed = np.cumsum(gap)
    return begin[session] + elapsed - elapsed[first][session]


def prepare_long_histories(out: Path, users: int = 64, days: int = 101, a_day: int = 10, items: int = 4000) -> Dataset:
    """A data set of users with ``a_day`` events on each of ``days`` train days, and on 18 days more to validate on.

    Popularity is Zipf's, no user meets an item twice; 60 % likes, 20 % dislikes, the rest exposures. The horizon is a
    day, so each train day is a request.
    """
    rng, first, horizon = np.random.default_rng(0), 20_000, 1
    all_days = days + 18
    length = all_days * a_day
    popularity = -np.log(rng.permutation(items) + 1.0)
    keys = popularity + rng.gumbel(size=(users, items))
    item = np.stack([rng.permutation(row) for row in np.argsort(-keys, axis=1)[:, :length]])
    day = np.repeat(first + np.arange(all_days), a_day)
    time = day * DAY + np.sort(rng.integers(0, DAY, (users, all_days, a_day)), axis=2).reshape(users, length)
    label = rng.choice(["like", "dislike", "exposed"], (users, length), p=[0.6, 0.2, 0.2])
    columns = {
        "user": np.repeat([f"u{number}" for number in range(users)], length),
        "item": np.char.add("i", item.ravel().astype(str)),
        "time": time.ravel().astype(np.int64),
        "label": label.ravel(),
    }
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.parquet"
        parquet.write_table(pa.table(columns), events)
        return prepare(
            [events],
            None,
            out,
            mapping=EventMapping((parse_rule("label==dislike"),), (parse_rule("label==like"),), time_unit="s"),
            item_mapping=ItemMapping(),
            split=SplitSettings(horizon, date_of(first + days + horizon), date_of(first + days + 10)),
            semantic_ids=SemanticIdSettings(encoder="tfidf"),
            report=lambda _: None,
        )
