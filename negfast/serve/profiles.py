"""`negfast user-profiles`: what kinds of items each user dislikes, so far and as the model expects."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from negfast.data.log import DISLIKE, EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.files import locked
from negfast.serve.context import check_paths, quick_imports, report_context_day, source_of
from negfast.serve.parts import write_in_parts
from negfast.serve.predict import USERS_AT_ONCE, requests_at

TOP = 50  # most probable next dislikes that the expected share is taken over
SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("category", pa.string()),
        ("dislikes", pa.int32()),
        ("likes", pa.int32()),
        ("dislike_rate", pa.float32()),
        ("lift", pa.float32()),
        ("expected_share", pa.float32()),
    ]
)


def profile_users(run: Path, attribute: str, data: Path | None, at: str | None, out: Path) -> None:
    """Writes a row for every user and every category (value of the item attribute) with anything to say.

    ``dislikes`` and ``likes`` count the user's items of the category by their last feedback up to the day;
    ``dislike_rate`` is dislikes / (dislikes + likes) with 5 pseudo-events at everyone's rate of the category, ``lift``
    its ratio to that rate; ``expected_share`` is the category's part of the probability of the user's 50 most probable
    next dislikes, an item of several categories counting for each (negfast's choice). Raises InputError for an
    attribute that the items do not have, and as `RunFolder.finished_engine` does.
    """
    check_paths(run, data, out)
    with locked(out):
        with quick_imports():
            from negfast.data.features import PSEUDO_EVENTS
            from negfast.runtime.generation import generate
            from negfast.runtime.run_folder import RunFolder

        folder = RunFolder(run)
        engine = folder.finished_engine(data, serving=True)
        attributes = engine.data.items.attributes
        if attribute not in attributes:
            there = ", ".join(attributes) or "none"
            raise InputError(f"--attribute {attribute!r}: the items of {run} have {there}")
        day = report_context_day(folder, engine.log, at)
        names, of_item = category_matrix(attributes[attribute])
        disliked, liked = (counts @ of_item for counts in feedback_matrices(engine.log, day))
        totals = np.asarray(disliked.sum(0)).ravel(), np.asarray(liked.sum(0)).ravel()
        overall = totals[0].sum() / max(totals[0].sum() + totals[1].sum(), 1)
        everyone = (totals[0] + PSEUDO_EVENTS * overall) / (totals[0] + totals[1] + PSEUDO_EVENTS)
        user_ids, categories = pa.array(engine.data.user_ids, pa.string()), pa.array(names, pa.string())

        def batch(start: int, stop: int) -> pa.Table:
            users = np.arange(start, stop, dtype=np.int32)
            items, log_p = generate(engine, requests_at(users, day), TOP)
            weight = np.where(items >= 0, np.exp(log_p), 0.0)
            weight /= np.maximum(weight.sum(1, keepdims=True), 1e-30)
            rows = np.repeat(np.arange(len(users)), TOP)
            shares = sp.csr_matrix(
                (weight.ravel(), (rows, np.maximum(items, 0).ravel())), (len(users), len(of_item.indptr) - 1)
            )
            found = [disliked[start:stop], liked[start:stop], shares @ of_item]
            row, category = sum(found).sorted_indices().nonzero()  # none is below 0
            bad, good, expected = (np.asarray(matrix[row, category]).ravel() for matrix in found)
            rate = (bad + PSEUDO_EVENTS * everyone[category]) / (bad + good + PSEUDO_EVENTS)
            columns = [
                user_ids.take(pa.array(users[row])),
                categories.take(pa.array(category)),
                pa.array(bad.astype(np.int32)),
                pa.array(good.astype(np.int32)),
                pa.array(rate.astype(np.float32)),
                pa.array((rate / everyone[category]).astype(np.float32)),
                pa.array(expected.astype(np.float32)),
            ]
            return pa.table(columns, schema=SCHEMA)

        about = {
            "what": "profiles",
            **source_of(folder, engine),
            "day": day,
            "attribute": attribute,
            "users": USERS_AT_ONCE,
        }
        write_in_parts(out, SCHEMA, about, engine.log.n_users, USERS_AT_ONCE, batch, ("profiles", "users"))


def category_matrix(values: list[tuple[str, ...]]) -> tuple[list[str], sp.csr_matrix]:
    """The distinct values of an attribute, and which item has which: [I, C] of 0 and 1."""
    names = sorted({name for of_item in values for name in of_item})
    number = {name: n for n, name in enumerate(names)}
    column = [number[name] for of_item in values for name in set(of_item)]
    rows = np.repeat(np.arange(len(values)), [len(set(of_item)) for of_item in values])
    return names, sp.csr_matrix((np.ones(len(rows)), (rows, column)), (len(values), max(len(names), 1)))


def feedback_matrices(log: EventLog, day: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Which items each user's last feedback up to a day's end is a dislike of, and a like of: [U, I] of 0 and 1."""
    rows = np.flatnonzero((log.feedback != EXPOSED) & (log.day <= day))
    pair = log.user[rows].astype(np.int64) * log.n_items + log.item[rows]
    last = len(rows) - 1 - np.unique(pair[::-1], return_index=True)[1]
    user, item, feedback = log.user[rows[last]], log.item[rows[last]], log.feedback[rows[last]]
    bad, good = feedback == DISLIKE, feedback == LIKE
    shape = (log.n_users, log.n_items)
    one, other = (sp.csr_matrix((np.ones(part.sum()), (user[part], item[part])), shape) for part in (bad, good))
    return one, other
