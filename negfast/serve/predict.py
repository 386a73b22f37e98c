"""`negfast predict`: what users are going to dislike, written batch by batch."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from negfast.data.dataset import file_record
from negfast.data.split import Requests
from negfast.errors import InputError
from negfast.files import locked
from negfast.prepare.readers import Source, check_columns, file_columns, read_table
from negfast.serve.context import check_paths, quick_imports, report_context_day, source_of
from negfast.serve.parts import write_in_parts
from negfast.serve.score import index_of

USERS_AT_ONCE = 4096
ROWS_AT_ONCE = 1 << 22  # of the output; fewer users at once where each has many
MEANING = "probability of the item as the user's next dislike, among the items that may be listed"
SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("rank", pa.int32()),
        ("item", pa.string()),
        pa.field("score", pa.float32(), metadata={"description": MEANING}),
    ]
)


def predict_run(
    run: Path,
    data: Path | None,
    at: str | None,
    top: int,
    out: Path,
    users: Path | None = None,
    items: Path | None = None,
    not_items: Path | None = None,
) -> None:
    """Writes (user, rank, item, score) to ``out``: the ``top`` unseen items that each user will most probably dislike.

    ``score`` is the probability of the item as the next dislike. ``users`` and ``items`` are files whose columns
    ``user`` and ``item`` name the only ones to answer for and to list, ``not_items`` one of items not to list: scores
    are then probabilities among the items that are left. The same call resumes one that was killed. Raises InputError
    for files that cannot be read or name nothing that is known, and as `RunFolder.finished_engine` does.
    """
    asked = {name: path for name, path in (("users", users), ("items", items), ("not_items", not_items)) if path}
    check_paths(run, data, out, asked.values())
    lists = {name: read_ids(path, "user" if name == "users" else "item") for name, path in asked.items()}
    with locked(out):
        with quick_imports():
            from negfast.runtime.generation import generate
            from negfast.runtime.run_folder import RunFolder

        folder = RunFolder(run)
        engine = folder.finished_engine(data, serving=True)
        known = {"user": engine.data.user_ids, "item": engine.data.items.ids}
        found = {name: _known(ids, known, name != "not_items") for name, ids in lists.items()}
        of_users = found.get("users", np.arange(engine.log.n_users))
        listed = np.full(engine.log.n_items, "items" not in found)
        listed[found.get("items", [])] = True
        listed[found.get("not_items", [])] = False
        top = min(top, int(listed.sum()))
        if not top:
            raise InputError("--items and --not-items: found no item to list, expected at least one")
        day = report_context_day(folder, engine.log, at)
        user_ids, item_ids = (pa.array(known[name], pa.string()) for name in ("user", "item"))
        excluded = np.flatnonzero(~listed)

        def batch(start: int, stop: int) -> pa.Table:
            part = of_users[start:stop].astype(np.int32)
            item, log_p = generate(engine, requests_at(part, day), top, excluded=excluded)
            rows, ranks = np.nonzero(item >= 0)
            columns = [
                user_ids.take(pa.array(part[rows])),
                pa.array((ranks + 1).astype(np.int32)),
                item_ids.take(pa.array(item[rows, ranks])),
                pa.array(np.exp(log_p[rows, ranks])),
            ]
            return pa.table(columns, schema=SCHEMA)

        at_once = max(1, min(USERS_AT_ONCE, ROWS_AT_ONCE // top))
        about: dict[str, Any] = {"what": "predict", **source_of(folder, engine), "day": day, "top": top}
        about |= {"users_at_once": at_once}
        about |= {name: file_record(path)["sha256"] for name, path in asked.items()}
        write_in_parts(out, SCHEMA, about, len(of_users), at_once, batch, ("predict", "users"))


def read_ids(path: Path, column: str) -> Source:
    """The column of ids of a table in any format that `negfast prepare` reads."""
    check_columns(path, [column], file_columns(path))
    return read_table(path, [column])


def _known(source: Source, known: dict[str, list[str]], needed: bool) -> np.ndarray:
    """The distinct indices of a column of ids, ascending; those that the data set does not have are counted on stderr.

    InputError where it has none of them, and one is ``needed``.
    """
    [column] = source.table.column_names
    index = index_of(source, column, known[column], needed)
    strange = int((index < 0).sum())
    if strange:
        print(f"{source.path}: {strange:,} of {len(index):,} {column}s are not in the data set", file=sys.stderr)
    return np.unique(index[index >= 0])


def requests_at(users: np.ndarray, day: int) -> Requests:
    """Requests of users at the end of a day, without futures."""
    none = np.zeros(len(users) + 1, dtype=np.int64)
    empty = np.empty(0, dtype=np.int32)
    return Requests(users, np.full(len(users), day, dtype=np.int32), none, empty, none, empty)
