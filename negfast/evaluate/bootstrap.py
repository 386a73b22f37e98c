"""Paired bootstrap over users: every metric of every row is computed under the same resamples of users.

A resample is how often each user was drawn, so a metric that is a ratio of sums over users costs one matrix
product for all resamples; the metrics of a ranked event list are walked once per resample in sorted order.
"""

from dataclasses import dataclass

import numba
import numpy as np

_CHUNK = 64  # resamples converted to float64 at a time


def resample_users(n_users: int, resamples: int, seed: int) -> np.ndarray:
    """How often each user is drawn, uint8 [1 + resamples, n_users]; row 0 is the sample itself, all ones."""
    rng = np.random.default_rng(seed)
    weights = np.ones((1 + resamples, n_users), dtype=np.uint8)  # a user is drawn 255 times in no lifetime
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(n_users, size=n_users), minlength=n_users)
    return weights


def weighted_sums(weights: np.ndarray, user: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The sum of each column over the resampled users' rows, float64 [B, C], for columns float64 [M, C]."""
    per_user = np.stack([np.bincount(user, column, weights.shape[1]) for column in columns.T], axis=1)
    chunks = [weights[b : b + _CHUNK].astype(np.float64) @ per_user for b in range(0, len(weights), _CHUNK)]
    return np.concatenate(chunks)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient, NaN where nothing was drawn."""
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


def interval(samples: np.ndarray) -> dict[str, float | None]:
    """Mean (of the sample itself, entry 0) and the 2.5 and 97.5 percentiles of the resamples; None if undefined."""
    if np.isnan(samples[0]):
        return {"mean": None, "low": None, "high": None}
    drawn = samples[1:][~np.isnan(samples[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    mean, low, high = float(samples[0]), float(low), float(high)
    return {"mean": mean, "low": None if np.isnan(low) else low, "high": None if np.isnan(high) else high}


@dataclass(frozen=True)
class RankedTotals:
    """Weighted totals of a ranked list of events, float64 [B] each, one entry a resample."""

    auc: np.ndarray  # NaN where only one class was drawn
    events: np.ndarray
    dislikes: np.ndarray
    top_events: np.ndarray  # exactly share * events
    top_dislikes: np.ndarray


def ranked_totals(
    weights: np.ndarray, user: np.ndarray, score: np.ndarray, dislike: np.ndarray, share: float
) -> RankedTotals:
    """AUC and the dislikes within the top ``share`` of the events, for every resample.

    Tied scores count as if in random order: half a win in the AUC, and a tied block cut by the share gives it
    dislikes in proportion. ``user`` indexes the columns of ``weights``; score float64 [E], dislike bool [E].
    """
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    ends = np.append(ranked[1:] != ranked[:-1], True) if len(ranked) else np.zeros(0, dtype=bool)
    return RankedTotals(*_ranked_totals(weights, user[order], dislike[order], ends, share))


@numba.njit(parallel=True, cache=True)
def _ranked_totals(weights, user, dislike, block_ends, share):
    n = weights.shape[0]
    auc, events, dislikes, top_events, top_dislikes = (
        np.full(n, np.nan),
        np.zeros(n),
        np.zeros(n),
        np.zeros(n),
        np.zeros(n),
    )
    for b in numba.prange(n):
        total = 0.0
        for e in range(len(user)):
            total += weights[b, user[e]]
        budget, room, taken = share * total, share * total, 0.0
        above, wins, positives = 0.0, 0.0, 0.0  # dislikes ranked above; pairs won; dislikes of all
        block, block_dislikes = 0.0, 0.0
        for e in range(len(user)):
            w = weights[b, user[e]]
            block += w
            if dislike[e]:
                block_dislikes += w
            if block_ends[e]:
                wins += (block - block_dislikes) * (above + 0.5 * block_dislikes)
                if block > 0:
                    part = min(1.0, room / block)
                    taken += part * block_dislikes
                    room -= part * block
                above += block_dislikes
                positives += block_dislikes
                block, block_dislikes = 0.0, 0.0
        if 0 < positives < total:
            auc[b] = wins / (positives * (total - positives))
        events[b], dislikes[b], top_events[b], top_dislikes[b] = total, positives, budget, taken
    return auc, events, dislikes, top_events, top_dislikes
