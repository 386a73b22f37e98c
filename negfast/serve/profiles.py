"""Profiles: what kinds of items each user dislikes, so far and as the model expects."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from negfast.data.log import DISLIKE, EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.serve.predict import requests_at

if TYPE_CHECKING:
    from negfast.runtime.engine import Engine

PSEUDO_EVENTS = 5  # at everyone's rate of the category, mixed into a rate
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


class Profiles:
    """What users dislike by category (value of an item attribute), from the events up to a day.

    ``dislikes`` and ``likes`` count the user's items of the category by their last feedback; ``dislike_rate`` is
    dislikes / (dislikes + likes) with 5 pseudo-events at everyone's rate of the category, ``lift`` its ratio to that
    rate; ``expected_share`` is the category's part of the probability of the user's 50 most probable next dislikes, an
    item of several categories counting for each (negfast's choice).
    """

    def __init__(self, engine: "Engine", attribute: str, day: int) -> None:
        """Raises InputError for an attribute that the items do not have."""
        attributes = engine.data.items.attributes
        if attribute not in attributes:
            there = ", ".join(attributes) or "none"
            raise InputError(f"--attribute {attribute!r}: the items of {engine.data.path} have {there}")
        names, self.of_item = category_matrix(attributes[attribute])
        self.engine, self.day, self.categories = engine, day, pa.array(names, pa.string())
        self.disliked, self.liked = (counts @ self.of_item for counts in feedback_matrices(engine.log, day))
        bad, good = (np.asarray(counts.sum(0)).ravel() for counts in (self.disliked, self.liked))
        overall = bad.sum() / max(bad.sum() + good.sum(), 1)
        self.everyone = (bad + PSEUDO_EVENTS * overall) / (bad + good + PSEUDO_EVENTS)

    def of(self, users: np.ndarray, user_ids: pa.Array) -> pa.Table:
        """A row for each of ``users`` int [U] and every category with anything to say, as `SCHEMA` says."""
        from negfast.runtime.generation import generate

        users = users.astype(np.int32)
        items, log_p = generate(self.engine, requests_at(users, self.day), TOP)
        weight = np.where(items >= 0, np.exp(log_p), 0.0)
        weight /= np.maximum(weight.sum(1, keepdims=True), 1e-30)
        rows = np.repeat(np.arange(len(users)), TOP)
        shape = (len(users), self.of_item.shape[0])
        shares = sp.csr_matrix((weight.ravel(), (rows, np.maximum(items, 0).ravel())), shape)
        found = [self.disliked[users], self.liked[users], shares @ self.of_item]
        row, category = sum(found).sorted_indices().nonzero()  # none is below 0
        if not len(row):
            return SCHEMA.empty_table()
        bad, good, expected = (np.asarray(matrix[row, category]).ravel() for matrix in found)
        rate = (bad + PSEUDO_EVENTS * self.everyone[category]) / (bad + good + PSEUDO_EVENTS)
        columns = [
            user_ids.take(pa.array(users[row])),
            self.categories.take(pa.array(category)),
            pa.array(bad.astype(np.int32)),
            pa.array(good.astype(np.int32)),
            pa.array(rate.astype(np.float32)),
            pa.array((rate / self.everyone[category]).astype(np.float32)),
            pa.array(expected.astype(np.float32)),
        ]
        return pa.table(columns, schema=SCHEMA)


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
