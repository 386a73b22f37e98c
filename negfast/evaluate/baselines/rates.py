"""Baselines that score a user-item pair: smoothed rates, a logistic and a boosted model on histories."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from negfast.data.features import HistoryFeatures
from negfast.data.log import DISLIKE
from negfast.data.split import first_feedback, sample_pairs
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.sets import EvalSet, SetColumns
from negfast.model.trees import fit_boosted, one_thread
from negfast.runtime.verdict import EXAMPLES

WARM_UP = 40  # days at the start of the log that are not fitted on, as histories are still short

# The design's boosted ranker.
BOOSTED: dict[str, Any] = {
    "learning_rate": 0.05,
    "max_iter": 200,
    "max_leaf_nodes": 15,
    "min_samples_leaf": 50,
    "l2_regularization": 1.0,
}

_BLOCK = 1 << 18  # pairs scored at a time

Scorer = Callable[[np.ndarray], np.ndarray]  # columns of `HistoryFeatures.rich` [Q, C] -> probability [Q]


def rate_predictions(
    features: HistoryFeatures, evalsets: Sequence[EvalSet], columns: Sequence[SetColumns], fit_until: int
) -> list[dict[str, Predictions]]:
    """``item-rate``, ``user-rate``, ``logistic``, ``boosted``, ``boosted-plus``: filter scores and, save for user-rate,
    pools. ``columns`` are what ``features`` say of each set.

    ``boosted`` has the features of the design, ``boosted-plus`` is fitted like the verdict's trees, on all
    that the verdict sees. The fitted ones are left out when the events to fit on hold one class only.
    """
    scorers, note = fit_scorers(features, fit_until)
    return [
        {
            name: Predictions(
                filter_score=_in_blocks(score, of_set.of_filter),
                filter_is_probability=True,
                pool_score=None
                if name == "user-rate"
                else _in_blocks(score, of_set.of_pools).reshape(evalset.pool_items.shape),
                kind="baseline",
                note="" if name.endswith("-rate") else note,
            )
            for name, score in scorers.items()
        }
        for evalset, of_set in zip(evalsets, columns, strict=True)
    ]


def fit_scorers(features: HistoryFeatures, fit_until: int) -> tuple[dict[str, Scorer], str]:
    """What each baseline makes of the columns of ``features``, the dislike probability, and what to say of a sample: of
    more first likes and dislikes before ``fit_until`` than the verdict's `EXAMPLES` models are fitted to those that
    `sample_pairs` draws."""
    log = features.log
    events = first_feedback(log)
    days = log.day
    events = events[log.before(fit_until)[events]]
    scorers: dict[str, Scorer] = {
        "item-rate": lambda columns: _rate(columns[:, 0]),
        "user-rate": lambda columns: _rate(columns[:, 1]),
    }
    # Of a short log at most 40 % is left out.
    events = events[days[events] - days.min() >= min(WARM_UP, int(0.4 * (fit_until - days.min())))]
    dislike = log.feedback[events] == DISLIKE
    if dislike.all() or not dislike.any():
        return scorers, ""
    drawn, note = sample_pairs(log.user[events], log.item[events], EXAMPLES), ""
    if len(drawn) < len(events):
        note = f"fitted to {len(drawn):,} of {len(events):,} first likes and dislikes, drawn by a hash"
    events, dislike = events[drawn], dislike[drawn]
    columns = features.rich(log.user[events], log.item[events], log.moments(features.context, events))
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    logistic.fit(columns[:, : features.n_simple].astype(float), dislike)
    scorers["logistic"] = lambda asked: logistic.predict_proba(asked[:, : features.n_simple].astype(float))[:, 1]
    boosted = HistGradientBoostingClassifier(**BOOSTED, early_stopping=False, random_state=0)
    with one_thread():
        boosted.fit(columns[:, : features.n_full], dislike)
    scorers["boosted"] = lambda asked: _probability(boosted, asked[:, : features.n_full])
    boosted_plus = fit_boosted(columns, dislike, seed=0)
    scorers["boosted-plus"] = lambda asked: _probability(boosted_plus, asked)
    return scorers, note


def _probability(model: HistGradientBoostingClassifier, columns: np.ndarray) -> np.ndarray:
    with one_thread():
        return model.predict_proba(columns)[:, 1]


def _in_blocks(score: Scorer, columns: np.ndarray) -> np.ndarray:
    """The scores of many rows: models copy what they score."""
    blocks = np.split(columns, range(_BLOCK, len(columns), _BLOCK))
    return np.concatenate([score(block) if len(block) else np.empty(0) for block in blocks])


def _rate(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit.astype(np.float64)))
