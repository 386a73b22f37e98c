"""What a model or baseline predicts for an evaluation set; a policy's predictions; the check of generated items."""

from dataclasses import dataclass

import numba
import numpy as np
from sklearn.linear_model import LogisticRegression

from negfast.data.log import EXPOSED, EventLog, history_ends
from negfast.data.split import Requests, sample_pairs
from negfast.evaluate.sets import ChoosingSet, EvalSet, SetColumns, check_choosable, filter_candidates
from negfast.model.verdict import Verdict
from negfast.runtime.engine import Engine
from negfast.runtime.verdict import (
    MEASURED_AT_MOST,
    Calibration,
    candidate_logits,
    shown_candidates,
    verdict_logits,
)

TOP = 50  # items generated for each request
SHOWN_AT_MOST = 100_000  # events that P(dislike | shown) is calibrated on


@dataclass(frozen=True)
class Predictions:
    """One predictor's output for an `EvalSet`; None where a predictor does not make it."""

    generated: np.ndarray | None = None  # int32 [R, TOP], item indices, most likely dislike first, -1 padding last
    filter_score: np.ndarray | None = None  # float64 [E], higher means more likely disliked
    filter_is_probability: bool = False  # whether filter_score is a probability (calibration is then measured)
    filter_threshold: float | None = None  # chosen on valid: events with filter_score >= it are filtered
    pool_score: np.ndarray | None = None  # float64 [N, 100], in the order of EvalSet.pool_items
    expected_reward: np.ndarray | None = None  # float64 [R], of one item drawn from a policy
    kind: str = "model"  # or "baseline"
    note: str = ""  # what to say of a sample that it was made from


def threshold_for_share(score: np.ndarray, share: float = 0.1) -> float:
    """The score at or above which the share of events is closest to ``share`` (the higher score of two as close).

    Meant for valid scores: filtering ``score >= threshold`` on test is what a deployment would do.
    """
    values, counts = np.unique(score, return_counts=True)
    at_or_above = np.cumsum(counts[::-1])[::-1] / len(score)
    return float(values[::-1][np.argmin(np.abs(at_or_above[::-1] - share))])


def calibrate(engine: Engine, valid: ChoosingSet) -> Calibration:
    """Fits the scaling and the threshold on the valid filter events, at most `MEASURED_AT_MOST` of them; InputError
    where one kind is missing."""
    check_choosable(valid)
    drawn = sample_pairs(valid.filter_user, valid.filter_item, MEASURED_AT_MOST)
    logits = candidate_logits(engine, filter_candidates(valid).take(drawn))
    return platt_scaling(logits, valid.filter_dislike[drawn])


def calibrate_shown(engine: Engine) -> Calibration | None:
    """The same for P(dislike | shown), on what was first shown on the days of valid.

    Of more than `SHOWN_AT_MOST` such events a draw by the run's seed is used (negfast's choice). None where the log has
    no exposures, or those days no dislike.
    """
    log, split = engine.log, engine.split
    if not (log.feedback == EXPOSED).any():
        return None
    candidates, disliked = shown_candidates(log, engine.config.history.context, split.valid_day, split.test_day)
    if len(disliked) > SHOWN_AT_MOST:
        draw = np.random.default_rng(engine.config.train.seed).choice(len(disliked), SHOWN_AT_MOST, replace=False)
        draw.sort()
        candidates, disliked = candidates.take(draw), disliked[draw]
    if not 0 < disliked.sum() < len(disliked):
        return None
    return platt_scaling(candidate_logits(engine, candidates), disliked)


def platt_scaling(logit: np.ndarray, disliked: np.ndarray) -> Calibration:
    """Scaling and threshold by logits float64 [E] and labels bool [E] of both kinds."""
    fit = LogisticRegression(C=1e6, tol=1e-9).fit(logit[:, None], disliked)
    scaling = Calibration(float(fit.coef_[0, 0]), float(fit.intercept_[0]), 0.5)
    return Calibration(scaling.slope, scaling.intercept, threshold_for_share(scaling.probability(logit)))


def verdict_predictions(
    verdict: Verdict, evalset: EvalSet, columns: SetColumns, calibration: Calibration
) -> Predictions:
    """What the verdict predicts for ``evalset``, of which ``columns`` are."""
    return Predictions(
        filter_score=calibration.probability(verdict_logits(verdict, columns.of_filter)),
        filter_is_probability=True,
        filter_threshold=calibration.threshold,
        pool_score=verdict_logits(verdict, columns.of_pools).reshape(evalset.pool_items.shape),
    )


def check_generated(log: EventLog, requests: Requests, generated: np.ndarray) -> None:
    """Checks that every generated item exists, is distinct within its row, and was unseen by the user up to t.

    ``generated`` is int32 [R, K]; -1 pads the end of a row. Raises ValueError naming the first row that fails.
    """
    if generated.ndim != 2 or len(generated) != len(requests):
        raise ValueError(f"generated: found shape {generated.shape}, expected [{len(requests)}, K]")
    begin = log.user_offsets[requests.user]
    end = history_ends(log, requests.user, requests.day)
    row, column, fault = _first_fault(generated.astype(np.int64), begin, end, log.item, log.n_items)
    if fault:
        reason = ("", "does not exist", "follows padding", "is generated twice", "was seen before")[fault]
        raise ValueError(
            f"generated: item {generated[row, column]} at rank {column + 1} of request {row} "
            f"(user {requests.user[row]}, day {requests.day[row]}) {reason}"
        )


@numba.njit(cache=True)
def _first_fault(generated, begin, end, item, n_items):
    seen_by = np.full(n_items, -1, np.int64)
    given_to = np.full(n_items, -1, np.int64)
    for row in range(generated.shape[0]):
        for event in range(begin[row], end[row]):
            seen_by[item[event]] = row
        padded = False
        for column in range(generated.shape[1]):
            i = generated[row, column]
            if i == -1:
                padded = True
                continue
            if i < 0 or i >= n_items:
                return row, column, 1
            if padded:
                return row, column, 2
            if given_to[i] == row:
                return row, column, 3
            if seen_by[i] == row:
                return row, column, 4
            given_to[i] = row
    return 0, 0, 0
