"""What a policy answers to an evaluation set: generated items, filter probabilities, pool scores."""

import numpy as np
from sklearn.linear_model import LogisticRegression

from negfast.data.log import EXPOSED
from negfast.evaluate.predictions import TOP, Predictions, threshold_for_share
from negfast.evaluate.sets import POOL, EvalSet, check_choosable
from negfast.model.prompts import MIXED
from negfast.runtime.engine import Engine
from negfast.runtime.generation import generate
from negfast.runtime.verdict import (
    Calibration,
    candidate_logits,
    group_candidates,
    shown_candidates,
)

SHOWN_AT_MOST = 100_000  # events that P(dislike | shown) is calibrated on


def filter_logits(engine: Engine, evalset: EvalSet, view: int = MIXED) -> np.ndarray:
    """Verdict logits of the filter events, float64 [E]."""
    order = np.lexsort((evalset.filter_day, evalset.filter_user))
    candidates = group_candidates(evalset.filter_user[order], evalset.filter_day[order], evalset.filter_item[order])
    out = np.empty(len(order))
    out[order] = candidate_logits(engine, candidates, view)
    return out


def pool_logits(engine: Engine, evalset: EvalSet) -> np.ndarray:
    """Verdict logits of the matched pools, float64 [N, POOL]."""
    user, day = np.repeat(evalset.pool_user, POOL), np.repeat(evalset.pool_day + 1, POOL)
    order = np.lexsort((day, user))
    candidates = group_candidates(user[order], day[order], evalset.pool_items.reshape(-1)[order])
    out = np.empty(len(order))
    out[order] = candidate_logits(engine, candidates)
    return out.reshape(-1, POOL)


def calibrate(engine: Engine, valid: EvalSet) -> Calibration:
    """Fits the scaling and the threshold on the valid filter events; InputError where they are of one kind."""
    check_choosable(valid)
    return platt_scaling(filter_logits(engine, valid), valid.filter_dislike)


def calibrate_shown(engine: Engine) -> Calibration | None:
    """The same for P(dislike | shown), on what was first shown on the days of valid.

    Of more than SHOWN_AT_MOST such events a draw by the run's seed is used (negfast's choice). None where the log has
    no exposures, or those days no dislike.
    """
    log, split = engine.log, engine.split
    if not (log.feedback == EXPOSED).any():
        return None
    candidates, disliked = shown_candidates(log, split.valid_day, split.test_day)
    if len(disliked) > SHOWN_AT_MOST:
        draw = np.random.default_rng(engine.config.train.seed).choice(len(disliked), SHOWN_AT_MOST, replace=False)
        draw.sort()
        owner = candidates.group_of_item[draw]
        candidates = group_candidates(candidates.user[owner], candidates.day[owner], candidates.items[draw])
        disliked = disliked[draw]
    if not 0 < disliked.sum() < len(disliked):
        return None
    return platt_scaling(candidate_logits(engine, candidates), disliked)


def platt_scaling(logit: np.ndarray, disliked: np.ndarray) -> Calibration:
    """Scaling and threshold by logits float64 [E] and labels bool [E] of both kinds."""
    fit = LogisticRegression(C=1e6).fit(logit[:, None], disliked)
    scaling = Calibration(float(fit.coef_[0, 0]), float(fit.intercept_[0]), 0.5)
    return Calibration(scaling.slope, scaling.intercept, threshold_for_share(scaling.probability(logit)))


def predict_set(engine: Engine, evalset: EvalSet, calibration: Calibration) -> Predictions:
    """All answers of the engine's policy to ``evalset``."""
    engine.policy.eval()
    return Predictions(
        generated=generate(engine, evalset.requests, TOP)[0],
        filter_score=calibration.probability(filter_logits(engine, evalset)),
        filter_is_probability=True,
        filter_threshold=calibration.threshold,
        pool_score=pool_logits(engine, evalset),
    )
