"""Seeded event logs of any size, for measurements: Zipf items, users of uneven activity, in order of time."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from negfast.data.log import DAY

FIRST_DAY = 19_700  # 2023-12-09
FILE_EVENTS = 1_000_000


def write_log(folder: Path, events: int, users: int = 0, items: int = 0, days: int = 180, seed: int = 0) -> Path:
    """Writes user, item, rating (1 to 5) and time (s) to Parquet files of a million events; returns ``folder``.

    By default there are 20 events a user and 100 an item. An item's share falls as 1 / rank; a tenth of the users has
    almost half of the events. Ratings depend on item and user. A file depends on its number and the sizes alone, and
    memory on the size of a file.
    """
    users, items = users or max(events // 20, 2), items or max(events // 100, 2)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, events, FILE_EVENTS)):
        rng = np.random.default_rng([seed, number])
        n = min(FILE_EVENTS, events - first)
        user = (users * rng.random(n) ** 3).astype(np.int64)
        rank = np.minimum((items + 1) ** rng.random(n) - 1, items - 1).astype(np.int64)
        item = rank * 7_368_787 % items if np.gcd(7_368_787, items) == 1 else rank
        taste = (item * 31 + user * 17) % 97 / 97
        rating = np.clip(np.rint(1 + 4 * (taste + rng.normal(0.35, 0.25, n))), 1, 5).astype(np.int8)
        at = np.sort(first + n * rng.random(n)) / events
        time = FIRST_DAY * DAY + (days * DAY * at).astype(np.int64)
        table = pa.table({"user": user, "item": item, "rating": rating, "time": time})
        parquet.write_table(table, folder / f"part-{number:05d}.parquet", compression="zstd")
    return folder
