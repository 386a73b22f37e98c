"""What likes and dislikes say of a user and an item beyond their rates, fresh to the second.

From residuals r = dislike - what the rates of user and item lead to expect, updated event by event (csrc/evidence.hpp).
The columns, of a user u, an item i and a moment:

- three of how people who judged like u judged i, and three of how u judged items judged like i: the sum over pairs of
  judgements, their cosine, and the sum over its weight. Both are neighbourhoods, estimated from sketches of fixed size.
- the same by a factorisation of the residuals that takes one gradient step an event.
- how u judged items of like text, by the cube of the cosine of their text vectors, and the weight of that; a ridge
  regression of u's residuals on text.
- what everyone said of items of like text, above the prior rate: those with the same first code of the semantic ID,
  and those with the same first two.
- running means of the dislikes of u, of i and of all; days since u last judged, since u last disliked, and since i was
  first judged (NaN: never).

Which of them and with which constants was chosen on polis (negfast's choice).
"""

from functools import cached_property

import numpy as np

from negfast import _core
from negfast.data.items import ItemTable
from negfast.data.log import EXPOSED, WITHDRAWN, EventLog

FITTED = 20_000  # items at most, the first, that the axes of the text vectors are fitted to


class Evidence:
    """Answers from the likes, dislikes and withdrawals before a moment in the context of `EventLog.moments`.

    Simultaneous events see nothing of each other, and an answer is the same to the bit whatever comes later. Feedback
    that changes counts as the difference to the pair's earlier one.
    """

    def __init__(self, log: EventLog, items: ItemTable, prior_rate: float, context: str) -> None:
        rows = np.flatnonzero(log.feedback != EXPOSED)
        moments = log.moments(context)
        rows = rows[np.argsort(moments[rows], kind="stable")]
        self.n_users, self.n_items, self.prior = log.n_users, log.n_items, min(max(prior_rate, 1e-6), 1 - 1e-6)
        self.user, self.item, self.time = log.user[rows], log.item[rows], moments[rows]
        self.feedback, self.earlier = log.feedback[rows], _earlier(self._pairs(self.user, self.item))
        self.text, self.cells = _text(items), _cells(items)
        first = np.flatnonzero((self.earlier < 0) & (self.feedback != WITHDRAWN))
        pairs = self._pairs(self.user[first], self.item[first])
        order = np.argsort(pairs)
        self.first, self.first_pairs = first[order], pairs[order]

    @property
    def width(self) -> int:
        return _core.EVIDENCE_COLUMNS

    def columns(self, user: np.ndarray, item: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """float32 [Q, width].

        Questions about the first feedback of a pair at its own moment, those of training and of the filter, are
        answered once for the whole log; others replay the log at each call: ask them together.
        """
        out = np.empty((len(user), self.width), np.float32)
        place = np.searchsorted(self.first_pairs, self._pairs(user, item))
        place = np.minimum(place, max(len(self.first) - 1, 0))
        own = np.zeros(len(user), bool)
        if len(self.first):
            own = (self.first_pairs[place] == self._pairs(user, item)) & (self.time[self.first[place]] == moment)
            if own.any():
                out[own] = self._of_first[place[own]]
        if not own.all():
            out[~own] = self._answer(user[~own], item[~own], moment[~own])
        return out

    @cached_property
    def _of_first(self) -> np.ndarray:
        """Answers float32 [F, width] to each pair's first feedback at its moment."""
        return self._answer(self.user[self.first], self.item[self.first], self.time[self.first])

    def _answer(self, user: np.ndarray, item: np.ndarray, moment: np.ndarray) -> np.ndarray:
        order = np.argsort(moment, kind="stable")
        asked = user[order].astype(np.int32), item[order].astype(np.int32), moment[order].astype(np.int64)
        found = np.empty((len(user), self.width), np.float32)
        events = self.user, self.item, self.time, self.feedback, self.earlier
        _core.evidence(*events, *asked, self.n_users, self.text, self.cells, self.prior, found)
        out = np.empty_like(found)
        out[order] = found
        return out

    def _pairs(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        return user.astype(np.int64) * self.n_items + item


def _earlier(pairs: np.ndarray) -> np.ndarray:
    """The row before each that holds the same pair, -1 where there is none, int64 [M]."""
    order = np.argsort(pairs, kind="stable")
    repeat = pairs[order[1:]] == pairs[order[:-1]]
    earlier = np.full(len(pairs), -1, np.int64)
    earlier[order[1:][repeat]] = order[:-1][repeat]
    return earlier


def _text(items: ItemTable) -> np.ndarray:
    """Unit vectors float32 [I, EVIDENCE_TEXT] along the principal axes of the original items; zeros without vectors."""
    out = np.zeros((len(items), _core.EVIDENCE_TEXT), np.float32)
    if items.vectors is None:
        return out
    known = np.linalg.norm(items.vectors, axis=1) > 0
    fitted = items.vectors[: items.original][:FITTED].astype(np.float64)
    mean = fitted.mean(0)
    axes = np.linalg.eigh((fitted - mean).T @ (fitted - mean))[1][:, ::-1][:, : out.shape[1]]
    along = (items.vectors - mean) @ axes
    norm = np.linalg.norm(along, axis=1, keepdims=True)
    out[:, : along.shape[1]] = np.divide(along, norm, out=np.zeros_like(along), where=known[:, None] & (norm > 0))
    return out


def _cells(items: ItemTable) -> np.ndarray:
    """Groups of items with the same first code and with the same first two, int32 [I, 2]; one group without codes."""
    if items.codes is None:
        return np.zeros((len(items), 2), np.int32)
    first = items.codes[:, 0].astype(np.int64)
    both = first * 2**16 + items.codes[:, min(1, items.codes.shape[1] - 1)]
    coarse, fine = (np.unique(cell, return_inverse=True)[1] for cell in (first, both))
    return np.stack([coarse, fine + coarse.max(initial=0) + 1], axis=1).astype(np.int32)
