"""What of the past makes the community prior: weights of decayed dislikes and likes, given or fitted.

The mass of an item, which the prior draws it by, is a weighted sum over half-lives of its decayed dislikes and likes,
plus the same for every item. `fit_weights` finds the weights under which futures in the train days are likeliest
(negfast's choice; the design has one half-life and fixed weights, `decay_weights`).
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from negfast.data.log import DISLIKE, LIKE, EventLog
from negfast.data.split import Requests

HALF_LIVES = (1.0, 4.0, 16.0, 64.0)  # days, of the fit
KINDS = (DISLIKE, LIKE)
REQUESTS = 10_000  # most that the fit looks at, drawn at random
ROUNDS, TOLERANCE = 2000, 1e-7  # of the fit; nats a request
LEAST = 1e-6  # mass that an item without events keeps, of the mean mass of the items drawn


@dataclass(frozen=True)
class MassWeights:
    """For each branch, of each kind of feedback and half-life. ``eps`` is the mass of an unseen item without events."""

    half_lives: tuple[float, ...]  # days
    next_dislike: tuple[tuple[float, ...], ...]  # [2][H]: of dislikes, of likes
    next_like: tuple[tuple[float, ...], ...]
    eps: float

    def masses(self, log: EventLog, first_day: int, last_day: int) -> np.ndarray:
        """Masses of both branches at the end of each day in first_day..last_day, days since 1970: float64 [2, D, I]."""
        total = np.zeros((2, last_day - first_day + 1, log.n_items))
        for kind, *weights in zip(KINDS, self.next_dislike, self.next_like, strict=True):
            for half_life, *of_branch in zip(self.half_lives, *weights, strict=True):
                if any(of_branch):
                    mass = decayed_mass(log, kind, half_life, first_day, last_day)
                    for branch, weight in enumerate(of_branch):
                        total[branch] += weight * mass
        return total

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Self:
        next_dislike, next_like = (tuple(map(tuple, read[name])) for name in ("next_dislike", "next_like"))
        return cls(tuple(read["half_lives"]), next_dislike, next_like, read["eps"])


def decay_weights(half_life_days: float, eps: float) -> MassWeights:
    """Dislikes alone for the branch of dislikes, likes alone for that of likes, with one half-life."""
    return MassWeights((half_life_days,), ((1.0,), (0.0,)), ((0.0,), (1.0,)), eps)


def decayed_mass(log: EventLog, feedback: int, half_life_days: float, first_day: int, last_day: int) -> np.ndarray:
    """Mass of every item at the end of each day in first_day..last_day, float64 [D, I].

    The events of all users with that feedback count; one of day d weighs 2^-((D - d) / half_life_days) at the end
    of day D >= d and nothing before. Days are UTC days since 1970.
    """
    n_days = last_day - first_day + 1
    counted = (log.feedback == feedback) & (log.day <= last_day)
    day, item = log.day[counted].astype(np.int64), log.item[counted].astype(np.int64)
    row = np.maximum(day - first_day, 0)  # an earlier event enters on the first row, with what is left of it
    weight = np.exp2(-np.maximum(first_day - day, 0) / half_life_days)
    counts = np.bincount(row * log.n_items + item, weight, n_days * log.n_items)
    mass = counts.astype(np.float64).reshape(n_days, log.n_items)  # without events numpy counts integers
    for today in range(1, n_days):
        mass[today] += mass[today - 1] * 2.0 ** (-1.0 / half_life_days)
    return mass


def fit_weights(log: EventLog, requests: Requests) -> MassWeights:
    """The weights under which the futures of ``requests`` are likeliest: in the mean over a future, then over requests.

    They are in units of an unseen item without events: ``eps`` is 1. A branch of which no request has a future gets
    weights of 0. Deterministic; looks at no more than `REQUESTS`.
    """
    some = np.flatnonzero((np.diff(requests.dislike_offsets) > 0) | (np.diff(requests.like_offsets) > 0))
    requests = requests.take(np.sort(np.random.default_rng(0).permutation(some)[:REQUESTS]))
    futures = [(requests.dislike_offsets, requests.dislikes), (requests.like_offsets, requests.likes)]
    owners = [np.repeat(np.arange(len(requests)), np.diff(offsets)) for offsets, _ in futures]
    seen_by, seen = seen_items(log, requests)
    days, first_day = requests.day.astype(np.int64), int(log.day.min())

    of_all = [log.n_items - np.bincount(seen_by, minlength=len(requests))]  # first of the mass that all items have
    of_future = [[np.ones(len(owner))] for owner in owners]
    for kind in KINDS:
        for half_life in HALF_LIVES:
            mass = decayed_mass(log, kind, half_life, first_day, int(days.max(initial=first_day)))
            row = days - first_day
            of_seen = np.bincount(seen_by, mass[row[seen_by], seen], len(requests))
            of_all.append(mass.sum(1)[row] - of_seen)
            for columns, owner, (_, items) in zip(of_future, owners, futures, strict=True):
                columns.append(mass[row[owner], items])
    branches = []
    for columns, owner in zip(of_future, owners, strict=True):
        weights = _likeliest(np.stack(columns, axis=1), owner, np.stack(of_all, axis=1))
        by_kind = (weights[1:] / weights[0]).reshape(len(KINDS), len(HALF_LIVES))
        branches.append(tuple(tuple(row) for row in by_kind.tolist()))
    return MassWeights(HALF_LIVES, branches[0], branches[1], eps=1.0)


def seen_items(log: EventLog, requests: Requests) -> tuple[np.ndarray, np.ndarray]:
    """The distinct items that each request's user had an event with up to its day: request int64 [S], item int32."""
    _, first = np.unique(log.user.astype(np.int64) * log.n_items + log.item, return_index=True)
    user, item, day = log.user[first], log.item[first], log.day[first]  # by user; a user's events are in order of time
    begin, end = (np.searchsorted(user, requests.user, side) for side in ("left", "right"))
    owner = np.repeat(np.arange(len(requests)), end - begin)
    place = np.arange(len(owner)) + np.repeat(begin - np.cumsum(end - begin) + end - begin, end - begin)
    known = day[place] <= requests.day[owner]
    return owner[known], item[place[known]]


def _likeliest(of_item: np.ndarray, owner: np.ndarray, of_all: np.ndarray) -> np.ndarray:
    """The weights float64 [C] of columns of mass that maximise the likelihood of items drawn by the weighted sum.

    ``of_item`` [E, C] are the masses of the items drawn, ``owner`` [E] their requests, ``of_all`` [R, C] the sums over
    what they were drawn from. Minorise and maximise (Hunter, Annals of Statistics 2004): the likelihood rises with
    every round, and no weight falls below 0. The first column, which every item has, keeps at least `LEAST` of the mean
    mass drawn: items without events stay possible where the log has none that ever get one.
    """
    present = np.unique(owner)
    if not len(present):
        return np.eye(of_item.shape[1])[0]
    share = 1 / np.bincount(owner)[owner]
    of_all = np.maximum(of_all[present], 0.0)
    weights = 1 / np.maximum(of_all.mean(0), 1e-9)
    before = -np.inf
    for _ in range(ROUNDS):
        drawn, total = of_item @ weights, of_all @ weights
        likelihood = ((share * np.log(drawn)).sum() - np.log(total).sum()) / len(present)
        if likelihood - before < TOLERANCE:
            break
        before = likelihood
        pull = of_all.T @ (1 / total)
        weights = weights * np.divide(of_item.T @ (share / drawn), pull, out=np.zeros(len(pull)), where=pull > 0)
        weights[0] = max(weights[0], LEAST * drawn.mean())
    return weights
