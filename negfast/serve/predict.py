"""Lists: what users are going to dislike."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from negfast.data.split import Requests

if TYPE_CHECKING:
    from negfast.runtime.engine import Engine

MEANING = "probability of the item as the user's next dislike, among the items that may be listed"
SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("rank", pa.int32()),
        ("item", pa.string()),
        pa.field("score", pa.float32(), metadata={"description": MEANING}),
    ]
)


def lists(
    engine: "Engine", users: np.ndarray, day: int, top: int, listed: np.ndarray, user_ids: pa.Array, item_ids: pa.Array
) -> pa.Table:
    """The ``top`` unseen items that each of ``users`` int [U] will most probably dislike after ``day``, out of those of
    the mask ``listed`` bool [I]: rows of `SCHEMA`, in the order of ``users``."""
    from negfast.runtime.generation import generate

    users = users.astype(np.int32)
    item, log_p = generate(engine, requests_at(users, day), top, excluded=np.flatnonzero(~listed))
    rows, ranks = np.nonzero(item >= 0)
    columns = [
        user_ids.take(pa.array(users[rows])),
        pa.array((ranks + 1).astype(np.int32)),
        item_ids.take(pa.array(item[rows, ranks])),
        pa.array(np.exp(log_p[rows, ranks])),
    ]
    return pa.table(columns, schema=SCHEMA)


def requests_at(users: np.ndarray, day: int) -> Requests:
    """Requests of users at the end of a day, without futures."""
    none = np.zeros(len(users) + 1, dtype=np.int64)
    empty = np.empty(0, dtype=np.int32)
    return Requests(users, np.full(len(users), day, dtype=np.int32), none, empty, none, empty)
