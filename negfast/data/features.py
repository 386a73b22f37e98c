"""What the past says of a user, an item and their pair, before any moment: inputs of verdict and baselines.

The last like or dislike of a user-item pair counts: when it changes, the earlier one is taken back. Exposures do
not count, and do not take a like or dislike back (negfast's choice); a withdrawal does.
"""

from collections.abc import Iterable

import numpy as np

from negfast.data.deviations import Deviations
from negfast.data.evidence import Evidence
from negfast.data.items import ItemTable
from negfast.data.log import DISLIKE, EXPOSED, EventLog
from negfast.data.running_sums import RunningSums

PSEUDO_EVENTS = 5  # of the prior rate, mixed into every rate
_INDICATORS = 32  # most frequent values of an attribute that get a column each


class HistoryFeatures:
    """Features of (user, item, moment) from events before the moment; rates are smoothed towards a prior rate.

    Events count from their moment in the context (`EventLog.moments`) on: in context "day", ask at the start of a day.

    ``simple`` gives the four of the logistic baseline, ``full`` those and what else the log and item table offer:
    with values, the item's and user's mean and the user's spread; with attributes, the user's and everyone's
    dislike rate among the item's values of each, numbers as they are, and indicators of frequent values. ``rich``
    adds how user and item deviate from what was to be expected of them, what is recent, and what is known of likes and
    dislikes of like users and like items: the verdict's features.
    """

    def __init__(self, log: EventLog, items: ItemTable, prior_rate: float, prior_value: float, context: str) -> None:
        self.prior_rate, self.prior_value = prior_rate, prior_value
        self.has_values = log.value is not None
        rows, changes = _changes(log)
        user, item, time = log.user[rows], log.item[rows], log.moments(context)[rows]
        self.by_user = RunningSums(user, time, changes)
        self.by_item = RunningSums(item, time, changes)
        self.attributes = [
            _Attribute(values, user, item, time, changes[:, :2], items.original) for values in items.attributes.values()
        ]
        kinds = [(changes[:, 0], changes[:, 1], prior_rate)]
        if self.has_values:
            kinds.append((changes[:, 2], changes[:, 3], prior_value))
        self.deviations = Deviations(user, item, time, kinds)
        self.evidence = Evidence(log, items, prior_rate, context)

    @property
    def width(self) -> int:
        """Columns of ``rich``."""
        full = 4 + 3 * self.has_values + sum(2 + attribute.static.shape[1] for attribute in self.attributes)
        return full + self.deviations.width + self.evidence.width + self.has_values

    def rate(self, sums: np.ndarray) -> np.ndarray:
        """The smoothed dislike rate of sums whose first columns are events and dislikes."""
        return (sums[..., 1] + PSEUDO_EVENTS * self.prior_rate) / (sums[..., 0] + PSEUDO_EVENTS)

    def item_rate(self, item: np.ndarray, moment: np.ndarray) -> np.ndarray:
        return self.rate(self.by_item.before(item, moment))

    def user_rate(self, user: np.ndarray, moment: np.ndarray) -> np.ndarray:
        return self.rate(self.by_user.before(user, moment))

    def simple(self, user: np.ndarray, item: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """Logit item rate, logit user rate and both log counts, float64 [Q, 4]."""
        of_user, of_item = self.by_user.before(user, moment), self.by_item.before(item, moment)
        columns = [_logit(self.rate(of_item)), _logit(self.rate(of_user))]
        return np.stack([*columns, np.log1p(of_item[:, 0]), np.log1p(of_user[:, 0])], axis=1)

    def full(self, user: np.ndarray, item: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """float64 [Q, C]; NaN where a feature is not known."""
        columns = list(self.simple(user, item, moment).T)
        if self.has_values:
            of_user, of_item = self.by_user.before(user, moment), self.by_item.before(item, moment)
            columns += [self._mean_value(of_item), self._mean_value(of_user), _spread(of_user)]
        for attribute in self.attributes:
            columns += [attribute.mean_rate(self, user, item, moment), attribute.mean_rate(self, None, item, moment)]
            columns += list(attribute.static[item].T)
        return np.stack(columns, axis=1)

    def rich(self, user: np.ndarray, item: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """``full``, `negfast.data.deviations`, `negfast.data.evidence` and with values the item's spread, float64
        [Q, width]; NaN as above."""
        columns = [self.full(user, item, moment)]
        columns += [part.columns(user, item, moment) for part in (self.deviations, self.evidence)]
        if self.has_values:
            columns.append(_spread(self.by_item.before(item, moment))[:, None])
        return np.concatenate(columns, axis=1)

    def _mean_value(self, sums: np.ndarray) -> np.ndarray:
        return (sums[:, 3] + PSEUDO_EVENTS * self.prior_value) / (sums[:, 2] + PSEUDO_EVENTS)


class _Attribute:
    """One attribute of the items, e.g. genres: rates by value and by (user, value), and static columns.

    Which static columns there are the ``original`` first items decide, so that later items change no column's meaning.
    """

    def __init__(
        self,
        values: list[tuple[str, ...]],
        user: np.ndarray,
        item: np.ndarray,
        time: np.ndarray,
        counts: np.ndarray,
        original: int | None,
    ) -> None:
        names = sorted({name for of_item in values for name in of_item})
        number = {name: n for n, name in enumerate(names)}
        self.n_values = max(len(names), 1)
        self.value = np.array([number[name] for of_item in values for name in of_item], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum([len(of_item) for of_item in values])])
        self.static = self._static_columns(names, len(values) if original is None else original)
        row, value = self._expand(item)
        everyone = RunningSums(value, time[row], counts[row]) if len(row) else None
        self.by_value = everyone
        self.by_user_value = (
            RunningSums(user[row].astype(np.int64) * self.n_values + value, time[row], counts[row])
            if len(row)
            else None
        )

    def mean_rate(
        self, features: HistoryFeatures, user: np.ndarray | None, item: np.ndarray, moment: np.ndarray
    ) -> np.ndarray:
        """The user's (everyone's if None) dislike rate, averaged over the item's values; NaN without values."""
        sums = self.by_value if user is None else self.by_user_value
        if sums is None:
            return np.full(len(item), np.nan)
        row, value = self._expand(item)
        key = value if user is None else user[row].astype(np.int64) * self.n_values + value
        rate = np.bincount(row, features.rate(sums.before(key, moment[row])), len(item))
        count = np.diff(self.offsets)[item]
        return np.divide(rate, count, out=np.full(len(item), np.nan), where=count > 0)

    def _expand(self, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A row for every value of every item asked: its index in ``item`` and the value."""
        count = np.diff(self.offsets)[item]
        row = np.repeat(np.arange(len(item)), count)
        return row, self.value[np.arange(count.sum()) + np.repeat(self.offsets[item] - np.cumsum(count) + count, count)]

    def _static_columns(self, names: list[str], original: int) -> np.ndarray:
        """The number itself of an attribute with one number an item; else indicators, float32 [I, C]."""
        n_items, first_values = len(self.offsets) - 1, self.value[: self.offsets[original]]
        item = np.repeat(np.arange(n_items), np.diff(self.offsets))
        counts = np.bincount(first_values, minlength=len(names))
        if (
            _all_numbers(name for name, count in zip(names, counts, strict=True) if count)
            and np.diff(self.offsets[: original + 1]).max(initial=0) == 1
        ):
            numbers = np.array([_number(name) for name in names], np.float32)
            column = np.full((n_items, 1), np.nan, np.float32)
            column[item, 0] = numbers[self.value]
            return column
        frequent = np.argsort(-counts, kind="stable")[: min(_INDICATORS, int((counts > 0).sum()))]
        column_of = np.full(len(names), -1)
        column_of[frequent] = np.arange(len(frequent))
        indicators = np.zeros((n_items, len(frequent)), np.float32)
        kept = column_of[self.value] >= 0
        indicators[item[kept], column_of[self.value[kept]]] = 1.0
        return indicators


def _changes(log: EventLog) -> tuple[np.ndarray, np.ndarray]:
    """How each like, dislike or withdrawal changes the counts, given the pair's earlier one: rows, float64 [M, 5].

    Columns: events, dislikes, events with a value, their values, squared values.
    """
    rows = np.flatnonzero(log.feedback != EXPOSED)
    state = np.zeros((len(rows), 5))
    judged = log.judged[rows]
    state[:, 0], state[:, 1] = judged, log.feedback[rows] == DISLIKE
    if log.value is not None:
        known = judged & np.isfinite(log.value[rows])
        value = np.where(known, log.value[rows], 0.0).astype(np.float64)
        state[:, 2], state[:, 3], state[:, 4] = known, value, value**2
    pair = log.user[rows].astype(np.int64) * log.n_items + log.item[rows]
    order = np.argsort(pair, kind="stable")  # within a pair as in the log, by time
    earlier = np.zeros_like(state)
    repeat = pair[order[1:]] == pair[order[:-1]]
    earlier[order[1:][repeat]] = state[order[:-1][repeat]]
    return rows, state - earlier


def _spread(sums: np.ndarray) -> np.ndarray:
    """The standard deviation of the values, NaN for fewer than two."""
    count = np.where(sums[:, 2] < 2, np.nan, sums[:, 2])
    return np.sqrt(np.maximum(sums[:, 4] / count - (sums[:, 3] / count) ** 2, 0.0))


def _logit(rate: np.ndarray) -> np.ndarray:
    rate = np.clip(rate, 1e-6, 1 - 1e-6)
    return np.log(rate) - np.log1p(-rate)


def _all_numbers(names: Iterable[str]) -> bool:
    return not any(np.isnan(_number(name)) for name in names)


def _number(name: str) -> float:
    """NaN for what is no number."""
    try:
        return float(name)
    except ValueError:
        return np.nan
