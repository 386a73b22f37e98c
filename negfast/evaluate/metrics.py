"""The metrics as samples: entry 0 of each array is the figure, the rest are its bootstrap resamples.

Names: ``FHR@20`` and the like are over primary requests. A suffix names another slice: ``/all`` every request;
``/past_dislike`` and ``/no_past_dislike`` by whether the user disliked anything before; ``/cold`` and ``/warm``
by whether the disliked item had an event before the valid day (all requests with such an item, hits on such
items only). Ties: generated items are as ordered by the predictor; everywhere else tied scores count as if in
random order, in expectation, so no order of the data can win or lose anything.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from negfast.data.split import Requests
from negfast.evaluate.bootstrap import ranked_totals, ratio, weighted_sums
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.sets import EvalSet

CUTOFFS = (5, 10, 20, 50)
FILTER_SHARE = 0.1
CALIBRATION_BINS = 20

Similarity = Callable[[Requests, np.ndarray], np.ndarray]
"""(requests, generated int32 [R, K]) -> float [R, K], the largest s_u(i, j) over j in F, 0 where there is none."""

Samples = dict[str, np.ndarray]  # metric -> float64 [1 + resamples]


@dataclass(frozen=True)
class Costs:
    """What the two errors of a filter cost, in one unit of the user's choice; both are above 0."""

    dislike: float  # of a dislike that is shown
    like: float  # of a like that is withheld

    @property
    def threshold(self) -> float:
        """The P(dislike) from which withholding costs no more than showing: p * dislike >= (1 - p) * like.

        It is the Bayes decision for a calibrated probability (Elkan, "The Foundations of Cost-Sensitive Learning",
        IJCAI 2001, section 1).
        """
        return self.like / (self.like + self.dislike)


def future_hits(offsets: np.ndarray, items: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Which generated items are in their request's ragged list, bool [R, K]; padding (-1) never is."""
    n = int(max(items.max(initial=0), generated.max(initial=0))) + 2
    rows = np.repeat(np.arange(len(generated), dtype=np.int64), np.diff(offsets))
    keys = np.sort(rows * n + items)
    asked = np.arange(len(generated), dtype=np.int64)[:, None] * n + np.where(generated < 0, n - 1, generated)
    place = np.minimum(np.searchsorted(keys, asked), max(len(keys) - 1, 0))
    return keys[place] == asked if len(keys) else np.zeros(generated.shape, dtype=bool)


def generation_samples(
    evalset: EvalSet,
    generated: np.ndarray,
    weights: np.ndarray,
    user: np.ndarray,
    similarity: Similarity | None = None,
) -> Samples:
    """FHR, soft FHR, recall, NDCG, next-negative hit rate and the dislike share of known hits.

    ``generated`` is int32 [R, K >= 50], ``user`` the column of ``weights`` of every request. The soft FHR@K is the
    mean over requests of the best of K credits: 1 for an item of F, else its similarity, held within [0, 1].
    """
    requests = evalset.requests
    dislikes, offsets = requests.dislikes, requests.dislike_offsets
    hit = future_hits(offsets, dislikes, generated)
    liked = future_hits(requests.like_offsets, requests.likes, generated)
    is_next = generated == evalset.next_dislike[:, None]
    in_future = np.diff(offsets)
    values = {
        **_hit_values(hit, in_future),
        **{f"NDCG@{k}": _ndcg(hit[:, :k], in_future) for k in CUTOFFS},
        **{f"next_HR@{k}": is_next[:, :k].any(1) for k in CUTOFFS},
    }
    if similarity is not None:
        credit = np.where(hit, 1.0, np.clip(similarity(requests, generated), 0.0, 1.0))
        credit[generated < 0] = 0.0
        values |= {f"soft_FHR@{k}": credit[:, :k].max(1) for k in CUTOFFS}
    everyone = np.ones(len(requests), dtype=bool)
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # metric -> numerator and denominator of each request
    for suffix, chosen in (("", evalset.primary), ("/all", everyone)):
        columns |= {name + suffix: (value * chosen, chosen) for name, value in values.items()}
        hits, likes = hit[:, :20].sum(1) * chosen, liked[:, :20].sum(1) * chosen
        columns[f"known_hit_dislike_share@20{suffix}"] = (hits, hits + likes)
    for suffix, chosen in (("/past_dislike", evalset.past_dislike), ("/no_past_dislike", ~evalset.past_dislike)):
        columns |= {name + suffix: (v * chosen, chosen) for name, v in _hit_values(hit, in_future).items()}
    cold = evalset.cold_item
    for suffix, kept in (("/cold", cold), ("/warm", ~cold)):
        left = np.add.reduceat(kept[dislikes], offsets[:-1], dtype=np.int64)
        chosen = left > 0
        hit_left = hit & kept[generated]  # where padding indexes the last item, hit is False
        columns |= {name + suffix: (v * chosen, chosen) for name, v in _hit_values(hit_left, left).items()}
    return _ratios(weights, user, columns)


def reward_samples(evalset: EvalSet, reward: np.ndarray, weights: np.ndarray, user: np.ndarray) -> Samples:
    """``mean_reward`` over requests of the expected reward of one generated item, ``reward`` float64 [R]."""
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    past = evalset.past_dislike
    slices = (("", evalset.primary), ("/all", np.ones_like(past)), ("/past_dislike", past), ("/no_past_dislike", ~past))
    for suffix, chosen in slices:
        columns[f"mean_reward{suffix}"] = (reward * chosen, chosen)
    return _ratios(weights, user, columns)


def pool_samples(evalset: EvalSet, score: np.ndarray, weights: np.ndarray, user: np.ndarray) -> Samples:
    """HR@10 and AUC of the disliked item among its 99 competitors, means over pools; ``score`` is [N, 100]."""
    above = (score[:, 1:] > score[:, :1]).sum(1)
    tied = (score[:, 1:] == score[:, :1]).sum(1)
    hit = np.clip((10 - above) / (tied + 1), 0.0, 1.0)  # the target is equally likely at each tied place
    auc = 1.0 - (above + tied / 2) / (score.shape[1] - 1)
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    cold, past = evalset.cold_item[evalset.pool_items[:, 0]], evalset.past_dislike[evalset.pool_request]
    for suffix, chosen in _slices(cold, past):
        columns[f"pool_hr@10{suffix}"] = (hit * chosen, chosen)
        columns[f"pool_auc{suffix}"] = (auc * chosen, chosen)
    return _ratios(weights, user, columns)


def filter_samples(evalset: EvalSet, predictions: Predictions, weights: np.ndarray, user: np.ndarray) -> Samples:
    """AUC, what filtering exactly the top 10 % does, the same at the valid threshold, and the calibration error."""
    score, dislike = predictions.filter_score, evalset.filter_dislike
    assert score is not None
    out: Samples = {}
    cold = evalset.cold_item[evalset.filter_item]
    for suffix, chosen in _slices(cold, evalset.filter_past_dislike):
        totals = ranked_totals(weights, user[chosen], score[chosen], dislike[chosen], FILTER_SHARE)
        out[f"filter_auc{suffix}"] = totals.auc
        if not suffix:
            out |= _filter_effect("filter", totals.events, totals.dislikes, totals.top_events, totals.top_dislikes)
    if predictions.filter_threshold is not None:
        events, dislikes, cut_events, cut_dislikes = _cut_at(
            predictions.filter_threshold, score, dislike, weights, user
        )
        out["filter_at_threshold_share"] = ratio(cut_events, events)
        out |= _filter_effect("filter_at_threshold", events, dislikes, cut_events, cut_dislikes)
    if predictions.filter_is_probability:
        bins = _calibration_bins(score)
        columns = np.zeros((len(score), CALIBRATION_BINS + 1))
        columns[np.arange(len(score)), bins] = score - dislike
        columns[:, -1] = 1.0
        sums = weighted_sums(weights, user, columns)
        out["filter_ece"] = ratio(np.abs(sums[:, :-1]).sum(1), sums[:, -1])
    return out


def cost_samples(evalset: EvalSet, score: np.ndarray, costs: Costs, weights: np.ndarray, user: np.ndarray) -> Samples:
    """What withholding at the threshold of ``costs`` does; ``score`` is a probability, float64 [E].

    ``saved_per_1000`` is in the unit of the costs, per 1,000 events, against showing everything.
    """
    events, dislikes, withheld, avoided = _cut_at(costs.threshold, score, evalset.filter_dislike, weights, user)
    likes_withheld = withheld - avoided
    return {
        "withheld_share": ratio(withheld, events),
        "dislikes_avoided_share": ratio(avoided, dislikes),
        "likes_withheld_share": ratio(likes_withheld, events - dislikes),
        "saved_per_1000": 1000 * ratio(costs.dislike * avoided - costs.like * likes_withheld, events),
    }


def reliability_curve(score: np.ndarray, dislike: np.ndarray) -> list[dict[str, float | int]]:
    """Mean probability, dislike rate and events of every non-empty calibration bin, ascending."""
    bins = _calibration_bins(score)
    events = np.bincount(bins, minlength=CALIBRATION_BINS)
    mean, rate = (np.bincount(bins, x, CALIBRATION_BINS) / np.maximum(events, 1) for x in (score, dislike))
    return [
        {"probability": float(mean[b]), "dislike_rate": float(rate[b]), "events": int(events[b])}
        for b in np.flatnonzero(events)
    ]


def _cut_at(
    threshold: float, score: np.ndarray, dislike: np.ndarray, weights: np.ndarray, user: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Events, dislikes, and both again among those with score >= threshold; float64 [1 + resamples] each."""
    cut = score >= threshold
    columns = np.stack([np.ones(len(cut)), dislike, cut, dislike & cut], axis=1)
    return tuple(weighted_sums(weights, user, columns).T)


def _filter_effect(
    name: str, events: np.ndarray, dislikes: np.ndarray, cut: np.ndarray, cut_dislikes: np.ndarray
) -> Samples:
    """How the dislike rate of the rest changes where ``cut`` of the events are withheld, and the likes lost for it."""
    rate_before, rate_after = ratio(dislikes, events), ratio(dislikes - cut_dislikes, events - cut)
    return {
        f"{name}_reduction": 1.0 - ratio(rate_after, rate_before),
        f"{name}_precision": ratio(cut_dislikes, cut),
        f"{name}_likes_lost_per_dislike": ratio(cut - cut_dislikes, cut_dislikes),
    }


def _calibration_bins(score: np.ndarray) -> np.ndarray:
    """Bins of about as many events each, equal scores together, int64 in [0, CALIBRATION_BINS)."""
    edges = np.quantile(score, np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS)
    return np.searchsorted(edges, score, side="right")


def _hit_values(hit: np.ndarray, in_future: np.ndarray) -> dict[str, np.ndarray]:
    any_hit = {f"FHR@{k}": hit[:, :k].any(1).astype(np.float64) for k in CUTOFFS}
    found = {f"recall@{k}": hit[:, :k].sum(1) / np.maximum(in_future, 1) for k in CUTOFFS}
    return any_hit | found


def _ndcg(hit: np.ndarray, in_future: np.ndarray) -> np.ndarray:
    """Binary NDCG against the best ranking of min(|F|, K) items."""
    gain = 1.0 / np.log2(np.arange(2, hit.shape[1] + 2))
    ideal = np.cumsum(gain)[np.minimum(in_future, hit.shape[1]) - 1]
    return (hit * gain).sum(1) / ideal


def _slices(cold: np.ndarray, past: np.ndarray) -> list[tuple[str, np.ndarray]]:
    slices = [("", np.ones_like(cold)), ("/cold", cold), ("/warm", ~cold)]
    return [*slices, ("/past_dislike", past), ("/no_past_dislike", ~past)]


def _ratios(weights: np.ndarray, user: np.ndarray, columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> Samples:
    stacked = np.stack([column for pair in columns.values() for column in pair], axis=1).astype(np.float64)
    sums = weighted_sums(weights, user, stacked)
    return {name: ratio(sums[:, 2 * k], sums[:, 2 * k + 1]) for k, name in enumerate(columns)}
