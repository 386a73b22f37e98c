"""What the past says of a user, an item and their pair, before any moment: inputs of verdict and baselines.

The last like or dislike of a user-item pair counts: when it changes, the earlier one is taken back. Exposures do
not count, and do not take a like or dislike back (negfast's choice); a withdrawal does. csrc/features.cpp computes the
columns event by event; which there are and with which constants was chosen on polis and MovieTweetings (negfast's
choice). `HistoryFeatures.names` names them:

- ``item_*``, ``user_*``: logit of the smoothed dislike rate, log(1 + events), in a log with values their smoothed mean
  and their spread.
- of each attribute, e.g. ``genres``: ``genres:user_rate`` and ``genres:rate``, the user's and everyone's dislike rate
  averaged over the item's values; then the number itself, ``year``, or indicators of frequent values, ``genres=Drama``.
- ``dislike_*``, and with values ``value_*``: how far user and item deviate from what was to be expected of each other.
  A user who disliked what everybody dislikes is no harsh judge; an item that only harsh judges saw is no bad item. So a
  user's deviation is the mean excess over the items' own means at the time, an item's the mean excess over what its
  judges' deviations had led to expect; ``_sum`` of both; ``_recent_*`` with weights that halve every 30 days;
  ``_user_off``: how far the user is off the items' means, whatever the sign. ``user_log_recent``: the user's events,
  with weights that halve every 2 days.
- evidence, from residuals r = dislike - what the rates of user and item led to expect:
  ``like_users_sum``: how people who judged like the user judged the item, the sum over its last 256 judgements of r
  times the cosine of the residuals of its judge and of the user, on what the user judged last, 128 judgements;
  ``like_users_mean``: that sum over the sum of the cosines' sizes. A user-based neighbourhood (Herlocker et al. 1999),
  exact but for what is older: memory is linear in users and items, and no likeness is kept.
  ``factors``: the same by a factorisation of r that takes one gradient step an event.
  ``text_*``: how the user judged the last 32 items, by the cube of the cosine of their text vectors, and the weight of
  that; ``text_ridge``: a ridge regression on text of the user's last 128 r. ``cell_coarse``, ``cell_fine``: what
  everyone said of items with the same first code of the semantic ID and with the same first two, above the prior rate.
- ``user_lately``, ``item_lately``, ``lately``: running means of dislikes, of the user, of the item and of all.
- ``days_*``: days since the user last judged, last disliked, and since the item was first judged.

NaN where a column is not known.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cached_property
from hashlib import blake2b
from typing import Self

import numpy as np

from negfast import _core
from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, EventLog, sort_stably
from negfast.data.split import first_feedback, sample_pairs

CONSTANTS: dict[str, float] = _core.FEATURE_CONSTANTS  # of the formulas in csrc/features.cpp; times in seconds
PSEUDO_EVENTS = CONSTANTS["pseudo_events"]  # of the prior rate, mixed into every rate
FITTED = 20_000  # items at most, the first, that the axes of the text vectors are fitted to
REPLAYED_AT_ONCE = 1 << 18  # events
ANSWERED_ONCE = 600_000  # pairs whose first feedback is answered for good, at most (negfast's choice)
_INDICATORS = 32  # most frequent values of an attribute that get a column each
_SIMPLE = ["item_logit_rate", "user_logit_rate", "item_log_events", "user_log_events"]
_VALUES = ["item_mean_value", "user_mean_value", "user_spread"]
_EVIDENCE = [
    *("like_users_sum", "like_users_mean"),
    *("factors", "text_mean", "text_weight", "text_ridge", "cell_coarse", "cell_fine"),
    *("user_lately", "item_lately", "lately"),
    *("days_since_judged", "days_since_dislike", "days_since_item_first"),
]


class HistoryFeatures:
    """Features of (user, item, moment) from the log's events before the moment in the context of `EventLog.moments`.

    In context "day", ask at the start of a day. Rates are smoothed towards ``prior_rate``, values towards
    ``prior_value``, by 5 pseudo-events. The first ``n_simple`` columns are those of the logistic baseline, the first
    ``n_full`` add what else the log and item table offer; all ``width`` are the verdict's features.

    Questions about the first feedback of a pair at its own moment, those of training and of the filter, are answered
    once for the whole log; of more than `ANSWERED_ONCE` pairs, for those that `sample_pairs` draws first. Others replay
    the log up to the last of them at each call: ask them together.
    """

    def __init__(
        self,
        log: EventLog,
        items: ItemTable,
        prior_rate: float,
        prior_value: float,
        context: str,
        user_ids: Sequence[str] | None = None,
    ) -> None:
        """``user_ids`` [U], from which users' first factors and their order within a moment are made; without them from
        their numbers."""
        self.context, self.prior_rate, self.prior_value = context, prior_rate, prior_value
        self.n_items, self.has_values = log.n_items, log.value is not None
        self.items, self.item_side = items, _ItemSide(items)
        self.item_columns = keys_of(items.ids), *self.item_side.arrays(items)
        self.user_keys = np.arange(log.n_users, dtype=np.uint64) if user_ids is None else keys_of(user_ids)
        self.n_simple = len(_SIMPLE)
        self.n_full = len(_SIMPLE) + len(_VALUES) * self.has_values + len(self.item_side.names)
        self.names = self._names()
        self.log, self.user, self.order = log, log.user, _by_moment(log, context)
        first = first_feedback(log)
        first = first[sample_pairs(self.user[first], log.item[first], ANSWERED_ONCE)]
        pairs = self._pairs(self.user[first], log.item[first])
        self.first_pairs, order = sort_stably(pairs, log.n_users * log.n_items)
        self.first_moments = self._moment(log.time[first[order]])

    @classmethod
    def smoothed(
        cls, log: EventLog, items: ItemTable, fit_until: int, context: str, user_ids: Sequence[str] | None = None
    ) -> Self:
        """Smoothed towards the rate and the mean value of the likes and dislikes before the day ``fit_until``."""
        early = log.before(fit_until) & log.judged
        rate = float((log.feedback[early] == DISLIKE).mean()) if early.any() else 0.5
        value = np.zeros(0) if log.value is None else log.value[early]
        known = value[np.isfinite(value)]
        return cls(log, items, rate, float(known.mean()) if len(known) else 0.0, context, user_ids)

    @property
    def width(self) -> int:
        """Columns of ``rich``."""
        return len(self.names)

    def rich(self, user: np.ndarray, item: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """float32 [Q, width] for users and items int [Q] and moments int [Q] in seconds."""
        out = np.empty((len(user), self.width), np.float32)
        place = np.searchsorted(self.first_pairs, self._pairs(user, item))
        place = np.minimum(place, max(len(self.first_pairs) - 1, 0))
        own = np.zeros(len(user), bool)
        if len(self.first_pairs):
            own = (self.first_pairs[place] == self._pairs(user, item)) & (self.first_moments[place] == moment)
            if own.any():
                out[own] = self._of_first[place[own]]
        if not own.all():
            self._answer(user, item, moment, np.flatnonzero(~own), out)
        return out

    def live(self) -> "LiveFeatures":
        """What is known at the log's end, to which events can be added."""
        live, nobody = self._start(), np.zeros(0, np.int32)
        for events in self._events():
            live.state.replay(*events, nobody, nobody, np.zeros(0, np.int64), np.empty((0, self.width), np.float32))
        return live

    @cached_property
    def _of_first(self) -> np.ndarray:
        """Answers to the first feedback of each of ``first_pairs`` at its moment."""
        out = np.empty((len(self.first_pairs), self.width), np.float32)
        self._answer(*np.divmod(self.first_pairs, self.n_items), self.first_moments, np.arange(len(out)), out)
        return out

    def _moment(self, time: np.ndarray) -> np.ndarray:
        """As `EventLog.moments`."""
        return time if self.context == "event" else time // DAY * DAY

    def _events(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """User, item, time, feedback and value of the events in order of moment, `REPLAYED_AT_ONCE` at a time; at least
        one such part."""
        log = self.log
        for begin in range(0, max(len(self.order), 1), REPLAYED_AT_ONCE):
            rows = self.order[begin : begin + REPLAYED_AT_ONCE]
            value = np.zeros(0, np.float32) if log.value is None else log.value[rows]
            yield self.user[rows], log.item[rows], log.time[rows], log.feedback[rows], value

    def _answer(
        self, user: np.ndarray, item: np.ndarray, moment: np.ndarray, rows: np.ndarray, out: np.ndarray
    ) -> None:
        """Fills ``rows`` int64 of ``out`` float32 [Q, width] with the answers to those questions."""
        order = rows[np.lexsort((user[rows], moment[rows]))]
        moments = moment[order].astype(np.int64)
        state, begin, replayed = self._start().state, 0, 0
        for events in self._events():
            end, time = len(order), events[2]
            replayed += len(time)
            if replayed < len(self.order):  # questions of later moments may be about events to come
                end = int(np.searchsorted(moments, self._moment(time[-1:])[0], side="right"))
            now_asked = order[begin:end]
            asked = user[now_asked].astype(np.int32), item[now_asked].astype(np.int32), moments[begin:end]
            answers = np.empty((end - begin, self.width), np.float32)
            state.replay(*events, *asked, answers)
            out[now_asked] = answers
            begin = end
            if begin == len(order):
                break

    def _start(self) -> "LiveFeatures":
        """What is known before the first event."""
        settings = self.context == "day", self.prior_rate, self.prior_value, self.has_values
        state = _core.Features(*settings, self.item_side.shapes)
        state.add_users(self.user_keys)
        state.add_values(*self.item_side.value_columns())
        state.add_items(*self.item_columns)
        return LiveFeatures(state, deepcopy(self.item_side))

    def _names(self) -> list[str]:
        kinds = ["dislike", "value"] if self.has_values else ["dislike"]
        parts = ["user", "item", "sum", "recent_user", "recent_item", "user_off"]
        deviations = [f"{kind}_{part}" for kind in kinds for part in parts]
        values, spread = (_VALUES, ["item_spread"]) if self.has_values else ([], [])
        return [*_SIMPLE, *values, *self.item_side.names, *deviations, "user_log_recent", *_EVIDENCE, *spread]

    def _pairs(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        return user.astype(np.int64) * self.n_items + item


class LiveFeatures:
    """A state that follows events as they come.

    ``state.add(user, item, time, feedback, value)`` learns an event (time in seconds; value NaN where there is none),
    ``state.answer(user, items, moment)`` gives the columns float32 [E, width] of one user's candidates int32 [E] from
    the events before a moment: the same bits as `HistoryFeatures` of a log with these events. Events of the newest
    moment wait until a later one is added or asked about, and count in an order that does not depend on when they came.
    ValueError for an event that is older than what was learned, and for a question that is.
    """

    def __init__(self, state: _core.Features, item_side: "_ItemSide") -> None:
        self.state, self.item_side = state, item_side

    def add_users(self, ids: Sequence[str]) -> None:
        """Makes users known, who get the next numbers; no other answer changes."""
        self.state.add_users(keys_of(ids))

    def add_items(self, items: ItemTable) -> None:
        """Makes items known, with what the table says of them; they get the next numbers. No other answer changes."""
        known = self.item_side.n_values
        columns = self.item_side.arrays(items)
        self.state.add_values(*(column[known:] for column in self.item_side.value_columns()))
        self.state.add_items(keys_of(items.ids), *columns)


class _ItemSide:
    """What the columns know of items beside events: the original items fix it, so later ones change no meaning."""

    def __init__(self, items: ItemTable) -> None:
        original = len(items) if items.original is None else items.original
        self.mean, self.axes = _axes(items)
        self.cells: dict[int, int] = {}  # code, or two codes -> number
        self.values: dict[str, dict[str, int]] = {}  # attribute -> value -> number, across attributes
        self.columns: dict[str, dict[str, int] | None] = {}  # of indicators; None: the number itself
        self.column_of: list[int] = []  # of each value, the column of its attribute that it sets, -1 for none
        self.contents: list[float] = []  # of each value, to what
        self.names: list[str] = []
        self.shapes: list[tuple[int, float]] = []  # columns of an attribute, and what they hold by default
        for name, values in items.attributes.items():
            self.values[name] = {}
            counts: dict[str, int] = {}
            for of_item in values[:original]:
                for value in of_item:
                    counts[value] = counts.get(value, 0) + 1
            most = max((len(of_item) for of_item in values[:original]), default=0)
            self.names += [f"{name}:user_rate", f"{name}:rate"]
            if most == 1 and not any(np.isnan(_number(value)) for value in counts):
                self.columns[name] = None
                self.names.append(name)
                self.shapes.append((1, np.nan))
            else:
                frequent = sorted(counts, key=lambda value: (-counts[value], value))[:_INDICATORS]
                self.columns[name] = {value: column for column, value in enumerate(frequent)}
                self.names += [f"{name}={value}" for value in frequent]
                self.shapes.append((len(frequent), 0.0))

    @property
    def n_values(self) -> int:
        return len(self.contents)

    def value_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """The column of its attribute that each value sets, int32, -1 for none, and to what, float32."""
        return np.array(self.column_of, np.int32), np.array(self.contents, np.float32)

    def arrays(self, items: ItemTable) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Text vectors, cells, where values begin and values, as `_core.Features.add_items` takes them; what is new
        among cells and values gets the next numbers."""
        columns = [items.attributes.get(name, [()] * len(items)) for name in self.values]
        lists = [
            [self._value(name, value) for value in values]
            for of_item in zip(*columns, strict=True)
            for name, values in zip(self.values, of_item, strict=True)
        ]
        start = np.cumsum([0, *(len(values) for values in lists)], dtype=np.int64)
        flat = np.array([value for values in lists for value in values], np.int32)
        return _along(items, self.mean, self.axes), self._cells(items), start, flat

    def _value(self, attribute: str, value: str) -> int:
        known, columns = self.values[attribute], self.columns[attribute]
        if value not in known:
            known[value] = self.n_values
            self.column_of.append(0 if columns is None else columns.get(value, -1))
            self.contents.append(_number(value) if columns is None else 1.0)
        return known[value]

    def _cells(self, items: ItemTable) -> np.ndarray:
        """Groups of items with the same first code and with the same first two, int32 [I, 2]; one without codes."""
        if items.codes is None:
            return np.tile(np.array([0, 1], np.int32), (len(items), 1))
        first = items.codes[:, 0].astype(np.int64)
        both = first << 16 | items.codes[:, min(1, items.codes.shape[1] - 1)]
        out = np.empty((len(items), 2), np.int32)
        for level, keys in enumerate((~first, both)):
            found, place = np.unique(keys, return_inverse=True)
            out[:, level] = np.array([self.cells.setdefault(key, len(self.cells)) for key in found.tolist()])[place]
        return out


def _by_moment(log: EventLog, context: str) -> np.ndarray:
    """Rows of likes, dislikes and withdrawals in order of moment, int32 or int64."""
    rows = np.flatnonzero(log.feedback != EXPOSED)
    if not len(rows):
        return rows
    moments = log.moments(context, rows)
    moments -= moments.min()
    order = sort_stably(moments, int(moments.max()) + 1)[1]
    return rows[order].astype(np.int32 if len(log) < 1 << 31 else np.int64)


def keys_of(ids: Sequence[str]) -> np.ndarray:
    """Numbers made of ids, uint64: from them random vectors and the order within a moment come, whatever the order in
    which users and items became known."""
    return np.frombuffer(b"".join(blake2b(name.encode(), digest_size=8).digest() for name in ids), np.uint64)


def text_vectors(items: ItemTable) -> np.ndarray:
    """Unit vectors float32 [I, FEATURE_TEXT] along the principal axes of the original items; zeros without vectors."""
    return _along(items, *_axes(items))


def _axes(items: ItemTable) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and principal axes [D, at most FEATURE_TEXT] of the original items' vectors. Of either sign of an axis
    the one whose largest component is positive: what is trained on them outlives a library."""
    if items.vectors is None:
        return np.zeros(0), np.zeros((0, 0))
    fitted = items.vectors[: items.original][:FITTED].astype(np.float64)
    mean = fitted.mean(0)
    axes = np.linalg.eigh((fitted - mean).T @ (fitted - mean))[1][:, ::-1][:, : _core.FEATURE_TEXT]
    return mean, axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])


def _along(items: ItemTable, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Unit vectors float32 [I, FEATURE_TEXT] of the items along the axes; zeros without vectors."""
    out = np.zeros((len(items), _core.FEATURE_TEXT), np.float32)
    if items.vectors is None or axes.size == 0:
        return out
    known = np.linalg.norm(items.vectors, axis=1) > 0
    along = (items.vectors - mean) @ axes
    norm = np.linalg.norm(along, axis=1, keepdims=True)
    out[:, : along.shape[1]] = np.divide(along, norm, out=np.zeros_like(along), where=known[:, None] & (norm > 0))
    return out


def _number(name: str) -> float:
    """NaN for what is no number."""
    try:
        return float(name)
    except ValueError:
        return np.nan
