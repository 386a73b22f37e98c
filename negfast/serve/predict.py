"""`negfast predict`: what every user is going to dislike, streamed to Parquet."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from negfast.data.split import Requests
from negfast.files import check_output_file
from negfast.runtime.generation import generate
from negfast.runtime.run_folder import RunFolder
from negfast.serve.context import told_context_day
from negfast.serve.parts import source_of, write_in_parts

USERS_AT_ONCE = 4096
SCHEMA = pa.schema([("user", pa.string()), ("rank", pa.int32()), ("item", pa.string()), ("score", pa.float32())])


def predict_run(run: Path, data: Path | None, at: str | None, top: int, out: Path) -> None:
    """Writes (user, rank, item, score) to ``out``: the ``top`` unseen items that each user will most probably dislike.

    ``score`` is the probability of the item as the next dislike. A call that was killed is gone on with by the same
    call. Raises InputError as `RunFolder.finished_engine` does.
    """
    check_output_file(out)
    folder = RunFolder(run)
    engine = folder.finished_engine(data)
    day = told_context_day(folder, engine.log, at)
    user_ids, item_ids = pa.array(engine.data.user_ids, pa.string()), pa.array(engine.data.items.ids, pa.string())

    def batch(start: int, stop: int) -> pa.Table:
        users = np.arange(start, stop, dtype=np.int32)
        items, log_p = generate(engine, requests_at(users, day), top)
        known = items >= 0
        rows, ranks = np.nonzero(known)
        columns = [
            user_ids.take(pa.array(users[rows])),
            pa.array((ranks + 1).astype(np.int32)),
            item_ids.take(pa.array(items[known])),
            pa.array(np.exp(log_p[known])),
        ]
        return pa.table(columns, schema=SCHEMA)

    about = {"what": "predict", **source_of(run, engine), "day": day, "top": top, "users_at_once": USERS_AT_ONCE}
    write_in_parts(out, SCHEMA, about, engine.log.n_users, USERS_AT_ONCE, batch, ("predict", "users"))


def requests_at(users: np.ndarray, day: int) -> Requests:
    """Requests of users at the end of a day, without futures."""
    none = np.zeros(len(users) + 1, dtype=np.int64)
    empty = np.empty(0, dtype=np.int32)
    return Requests(users, np.full(len(users), day, dtype=np.int32), none, empty, none, empty)
