"""Baselines that score a user-item pair: smoothed rates, a logistic and a boosted model on histories."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from negfast.data.features import HistoryFeatures
from negfast.data.items import ItemTable
from negfast.data.log import DISLIKE, EventLog
from negfast.data.split import first_feedback, sample_pairs
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.sets import EvalSet
from negfast.runtime.verdict import EXAMPLES

WARM_UP = 40  # days at the start of the log that are not fitted on, as histories are still short

# The design's boosted ranker. With all features, settings were tried on MovieTweetings' valid split: trees of 7 to 31
# leaves, 200 to 400 of them, larger leaves, fewer features a split. All AUCs lay within .7955 and .7982.
BOOSTED: dict[str, Any] = {
    "learning_rate": 0.05,
    "max_iter": 200,
    "max_leaf_nodes": 15,
    "min_samples_leaf": 50,
    "l2_regularization": 1.0,
}
BOOSTED_PLUS = BOOSTED | {"max_iter": 300, "max_leaf_nodes": 7, "min_samples_leaf": 200, "max_features": 0.3}

_SMALL = 500_000  # rows
_BLOCK = 1 << 18  # pairs scored at a time

Scorer = Callable[[np.ndarray], np.ndarray]  # columns of `HistoryFeatures.rich` [Q, C] -> probability [Q]


def rate_predictions(
    log: EventLog, items: ItemTable, evalsets: Sequence[EvalSet], fit_until: int
) -> list[dict[str, Predictions]]:
    """``item-rate``, ``user-rate``, ``logistic``, ``boosted``, ``boosted-plus``: filter scores and, save for user-rate,
    pools.

    Rates are smoothed with 5 pseudo-events at the dislike rate before ``fit_until``. ``boosted`` has the features of
    the design, ``boosted-plus`` all that the model's verdict sees. The fitted ones are left out when the events to fit
    on hold one class only.
    """
    features, scorers, note = fit_scorers(log, items, fit_until, evalsets[0].context)
    asked = [pairs for evalset in evalsets for pairs in (_filter_pairs(evalset), _pool_pairs(evalset))]
    columns = features.rich(*(np.concatenate(column) for column in zip(*asked, strict=True)))  # one replay of the log
    parts = np.split(columns, np.cumsum([len(user) for user, _, _ in asked])[:-1])
    return [
        {
            name: Predictions(
                filter_score=_in_blocks(score, of_filter),
                filter_is_probability=True,
                pool_score=None
                if name == "user-rate"
                else _in_blocks(score, of_pools).reshape(evalset.pool_items.shape),
                kind="baseline",
                note="" if name.endswith("-rate") else note,
            )
            for name, score in scorers.items()
        }
        for evalset, of_filter, of_pools in zip(evalsets, parts[::2], parts[1::2], strict=True)
    ]


def fit_scorers(
    log: EventLog, items: ItemTable, fit_until: int, context: str
) -> tuple[HistoryFeatures, dict[str, Scorer], str]:
    """The features of ``log``, what each baseline makes of their columns, the dislike probability, and what to say of
    a sample: of more first likes and dislikes than the verdict's `EXAMPLES` models are fitted to those that
    `sample_pairs` draws."""
    events = first_feedback(log)
    days = log.day
    events = events[log.before(fit_until)[events]]
    dislike = log.feedback[events] == DISLIKE
    value = log.value[events] if log.value is not None else np.zeros(0)
    features = HistoryFeatures(
        log,
        items,
        prior_rate=float(dislike.mean()) if len(events) else 0.5,
        prior_value=float(value[np.isfinite(value)].mean()) if np.isfinite(value).any() else 0.0,
        context=context,
    )
    scorers: dict[str, Scorer] = {
        "item-rate": lambda columns: _rate(columns[:, 0]),
        "user-rate": lambda columns: _rate(columns[:, 1]),
    }
    # Of a short log at most 40 % is left out.
    fitted = days[events] - days.min() >= min(WARM_UP, int(0.4 * (fit_until - days.min())))
    events, dislike = events[fitted], dislike[fitted]
    if dislike.all() or not dislike.any():
        return features, scorers, ""
    drawn, note = sample_pairs(log.user[events], log.item[events], EXAMPLES), ""
    if len(drawn) < len(events):
        note = f"fitted to {len(drawn):,} of {len(events):,} first likes and dislikes, drawn by a hash"
    events, dislike = events[drawn], dislike[drawn]
    columns = features.rich(log.user[events], log.item[events], log.moments(context, events))
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    logistic.fit(columns[:, : features.n_simple].astype(float), dislike)
    scorers["logistic"] = lambda asked: logistic.predict_proba(asked[:, : features.n_simple].astype(float))[:, 1]
    scorers["boosted"] = _boosted(BOOSTED, features.n_full, columns, dislike)
    scorers["boosted-plus"] = _boosted(BOOSTED_PLUS, features.width, columns, dislike)
    return features, scorers, note


def _boosted(settings: dict[str, Any], first: int, columns: np.ndarray, dislike: np.ndarray) -> Scorer:
    """Boosted trees on so many first columns."""
    model = HistGradientBoostingClassifier(**settings, early_stopping=False, random_state=0)
    with _threads(len(dislike)):
        model.fit(columns[:, :first], dislike)

    def score(asked: np.ndarray) -> np.ndarray:
        with _threads(len(asked)):
            return model.predict_proba(asked[:, :first])[:, 1]

    return score


def _in_blocks(score: Scorer, columns: np.ndarray) -> np.ndarray:
    """The scores of many rows: models copy what they score."""
    blocks = np.split(columns, range(_BLOCK, len(columns), _BLOCK))
    return np.concatenate([score(block) if len(block) else np.empty(0) for block in blocks])


def _rate(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit.astype(np.float64)))


def _threads(rows: int) -> threadpool_limits:
    """One OpenMP thread for a small job: waiting threads spin, ten times slower where cores are shared."""
    return threadpool_limits(limits=1 if rows < _SMALL else None, user_api="openmp")


def _filter_pairs(evalset: EvalSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return evalset.filter_user, evalset.filter_item, evalset.filter_moment


def _pool_pairs(evalset: EvalSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = evalset.pool_items.shape[1]
    return np.repeat(evalset.pool_user, size), evalset.pool_items.ravel(), np.repeat(evalset.pool_moment, size)
