"""Lists: what users are going to dislike."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from negfast.data.split import Requests

if TYPE_CHECKING:
    from negfast.runtime.engine import Engine

MEANING = {
    "likely": "probability of the item as the user's next dislike, among the items that may be listed",
    "taste": "log of the dislike probability, raised by what the user goes for and lowered for items on too many lists",
}


def list_schema(rank: str) -> pa.Schema:
    """Of lists that are ranked by "likely" or "taste"."""
    score = pa.field("score", pa.float32(), metadata={"description": MEANING[rank]})
    return pa.schema([("user", pa.string()), ("rank", pa.int32()), ("item", pa.string()), score])


def likely_lists(
    engine: "Engine", users: np.ndarray, day: int, top: int, excluded: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The ``top`` unseen items that each of ``users`` int [U] will most probably dislike after ``day``, without those
    of ``excluded`` (indices): int32 [U, top] and probabilities float32 [U, top], -1 and 0 pad."""
    from negfast.runtime.generation import generate

    items, log_p = generate(engine, requests_at(users, day), top, excluded=excluded)
    return items, np.exp(log_p)


def list_table(
    rank: str, users: np.ndarray, items: np.ndarray, scores: np.ndarray, user_ids: pa.Array, item_ids: pa.Array
) -> pa.Table:
    """Lists int [U, top] of ``users`` int [U], padded with -1, as rows of `list_schema` in their order."""
    rows, places = np.nonzero(items >= 0)
    columns = [
        user_ids.take(pa.array(users[rows])),
        pa.array((places + 1).astype(np.int32)),
        item_ids.take(pa.array(items[rows, places])),
        pa.array(scores[rows, places]),
    ]
    return pa.table(columns, schema=list_schema(rank))


def requests_at(users: np.ndarray, day: int) -> Requests:
    """Requests of users at the end of a day, without futures."""
    none = np.zeros(len(users) + 1, dtype=np.int64)
    empty = np.empty(0, dtype=np.int32)
    return Requests(users, np.full(len(users), day, dtype=np.int32), none, empty, none, empty)
