"""Profiles: what kinds of items each user dislikes, so far and as the model expects."""

import json
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from negfast.data.features import PSEUDO_EVENTS
from negfast.data.log import DISLIKE, EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.serve.predict import requests_at
from negfast.serve.reasons import LEAST, MOST, cluster_names, gather, item_clusters, posterior, strength

if TYPE_CHECKING:
    from negfast.runtime.engine import Engine

TOP = 50  # most probable next dislikes that the expected share is taken over
EXAMPLES = 3
SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("category", pa.string()),
        ("dislikes", pa.int32()),
        ("likes", pa.int32()),
        ("expected", pa.float32()),
        ("dislike_rate", pa.float32()),
        ("lift", pa.float32()),
        ("lift_low", pa.float32()),
        ("lift_high", pa.float32()),
        ("expected_share", pa.float32()),
        ("items", pa.string()),
    ]
)


class Profiles:
    """What users dislike by category, from the events up to a day: by value of an item attribute, or by cluster of item
    vectors (`negfast.serve.reasons`).

    ``dislikes`` and ``likes`` count the user's items of the category by their last feedback; ``expected`` are the
    dislikes that the rates of the items, and of the user elsewhere, lead to expect, NaN without feedback;
    ``dislike_rate`` and ``lift`` are the posterior's means, ``lift_low`` and ``lift_high`` its 95 % interval;
    ``expected_share`` is the category's part of the probability of the user's 50 most probable next dislikes, an item
    of several categories counting for each; ``items`` is a JSON list of at most 3 disliked ids, those that others
    dislike least first (negfast's choice).
    """

    def __init__(self, engine: "Engine", attribute: str | None, day: int) -> None:
        """Raises InputError for an attribute that the items do not have."""
        items = engine.data.items
        if attribute is None:
            self.of_item = item_clusters(engine.data.embedding)
            names = cluster_names(items, self.of_item)
        elif attribute in items.attributes:
            names, self.of_item = category_matrix(items.attributes[attribute])
        else:
            there = ", ".join(items.attributes) or "none"
            raise InputError(f"--attribute {attribute!r}: the items of {engine.data.path} have {there}")
        self.engine, self.day, self.categories = engine, day, pa.array(names, pa.string())
        self.disliked, liked = feedback_matrices(engine.log, day)
        found = gather(self.disliked, liked, self.of_item)
        self.strength = strength(found)
        shape = (engine.log.n_users, self.of_item.shape[1])
        self.evidence = [
            sp.csr_matrix((column, (found.user, found.group)), shape)
            for column in (found.items, found.dislikes, found.expected)
        ]
        bad, good = (np.asarray(counts.sum(0)).ravel() for counts in (self.disliked, liked))
        self.overall = bad.sum() / max(bad.sum() + good.sum(), 1)
        self.item_rate = (bad + PSEUDO_EVENTS * self.overall) / (bad + good + PSEUDO_EVENTS)

    def of(self, users: np.ndarray, user_ids: pa.Array) -> pa.Table:
        """A row for each of ``users`` int [U] and every category with anything to say, as `SCHEMA` says."""
        from negfast.runtime.generation import generate

        users = users.astype(np.int32)
        items, log_p = generate(self.engine, requests_at(users, self.day), TOP)
        weight = np.where(items >= 0, np.exp(log_p), 0.0)
        weight /= np.maximum(weight.sum(1, keepdims=True), 1e-30)
        shape = (len(users), self.of_item.shape[0])
        rows = np.repeat(np.arange(len(users)), TOP)
        likely = sp.csr_matrix((weight.ravel(), (rows, np.maximum(items, 0).ravel())), shape) @ self.of_item
        matrices = [likely, *(matrix[users] for matrix in self.evidence)]
        row, category = (matrices[0] + matrices[1]).sorted_indices().nonzero()  # none is below 0
        if not len(row):
            return SCHEMA.empty_table()
        share, n, bad, due = (np.asarray(matrix[row, category]).ravel() for matrix in matrices)
        mean = np.where(n > 0, due / np.maximum(n, 1), self.overall)
        known = posterior(np.clip(mean, LEAST, MOST), n, bad, self.strength)
        figures = np.where(n > 0, due, np.nan), known.rate, known.lift, known.low, known.high, share
        columns = [
            user_ids.take(pa.array(users[row])),
            self.categories.take(pa.array(category)),
            pa.array(bad.astype(np.int32)),
            pa.array((n - bad).astype(np.int32)),
            *(pa.array(figure.astype(np.float32)) for figure in figures),
            pa.array(self._examples(users, row, category), pa.string()),
        ]
        return pa.table(columns, schema=SCHEMA)

    def _examples(self, users: np.ndarray, row: np.ndarray, category: np.ndarray) -> list[str]:
        """``items`` of the categories of ``users[row]``."""
        user, item = self.disliked[users].nonzero()
        order = np.lexsort((item, self.item_rate[item], user))
        ids, examples = self.engine.data.items.ids, defaultdict[tuple[int, int], list[str]](list)
        for place in order.tolist():
            begin, end = self.of_item.indptr[item[place] : item[place] + 2]
            for number in self.of_item.indices[begin:end].tolist():
                named = examples[int(user[place]), number]
                if len(named) < EXAMPLES:
                    named.append(ids[item[place]])
        pairs = zip(row.tolist(), category.tolist(), strict=True)
        return [json.dumps(examples[pair], ensure_ascii=False) for pair in pairs]


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
