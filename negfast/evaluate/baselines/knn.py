"""Item neighbours: what people who disliked (or consumed) the user's items disliked (consumed) too."""

from collections.abc import Sequence

import numba
import numpy as np
from scipy import sparse

from negfast.data.log import DISLIKE, EventLog, history_ends
from negfast.data.split import Requests
from negfast.evaluate.baselines.ranking import day_scores
from negfast.evaluate.predictions import TOP, Predictions
from negfast.evaluate.sets import EvalSet

_BLOCK = 512  # requests scored at a time, which bounds the memory for similarities


def knn_predictions(log: EventLog, evalsets: Sequence[EvalSet], fit_until: int) -> list[dict[str, Predictions]]:
    """``knn-dislikes`` (dislikes as history and as counts) and ``knn-all`` (every event as both).

    The score of item i is the sum over the history's items j of c/(c+5) * c/sqrt((c_i+3)(c_j+3)), where c_i users
    have i and c both, counted before ``fit_until``. Ties: more events up to t first, then the lower index.
    """
    days = np.unique(np.concatenate([evalset.requests.day for evalset in evalsets]))
    busiest_first = {
        day: np.argsort(-events, kind="stable").astype(np.int32) for day, _, events in day_scores(log, days)
    }
    predictions: list[dict[str, Predictions]] = [{} for _ in evalsets]
    for name, counted in (("knn-dislikes", log.feedback == DISLIKE), ("knn-all", np.ones(len(log), dtype=bool))):
        known = np.flatnonzero(counted & log.before(fit_until))
        consumed = _incidence(log.user[known], log.item[known], (log.n_users, log.n_items))
        for evalset, of_set in zip(evalsets, predictions, strict=True):
            generated = _generate(log, evalset.requests, counted, consumed, busiest_first)
            of_set[name] = Predictions(generated=generated, kind="baseline")
    return predictions


def _generate(
    log: EventLog,
    requests: Requests,
    counted: np.ndarray,
    consumed: sparse.csr_matrix,
    busiest_first: dict[int, np.ndarray],
) -> np.ndarray:
    begin = log.user_offsets[requests.user]
    end = history_ends(log, requests.user, requests.day)
    out = np.full((len(requests), TOP), -1, np.int32)
    popularity = np.asarray(consumed.sum(axis=0)).ravel()
    for start in range(0, len(requests), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(requests)))
        counts = end[rows] - begin[rows]
        event = np.arange(counts.sum()) + np.repeat(begin[rows] - np.cumsum(counts) + counts, counts)
        row = np.repeat(np.arange(len(rows)), counts)[counted[event]]
        needed, column = np.unique(log.item[event[counted[event]]], return_inverse=True)
        history = _incidence(row, column, (len(rows), len(needed)))
        scores = (history @ _similarity(consumed, popularity, needed)).tocsr()
        for k, r in enumerate(rows):
            entries = slice(scores.indptr[k], scores.indptr[k + 1])
            out[r] = _top_unseen(
                scores.indices[entries],
                scores.data[entries],
                log.item[begin[r] : end[r]],
                busiest_first[int(requests.day[r])],
            )
    return out


def _similarity(consumed: sparse.csr_matrix, popularity: np.ndarray, needed: np.ndarray) -> sparse.csr_matrix:
    """Shrunk cosine of the items ``needed`` to every item, [len(needed), I]."""
    together = (consumed[:, needed].T @ consumed).tocoo()
    c = together.data
    value = c / (c + 5) * c / np.sqrt((popularity[needed[together.row]] + 3) * (popularity[together.col] + 3))
    return sparse.csr_matrix((value, (together.row, together.col)), shape=together.shape)


def _incidence(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """1 where a pair occurs, however often."""
    matrix = sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


@numba.njit(cache=True)
def _top_unseen(scored, score, seen, order):
    """The `TOP` unseen items of highest score (0 where not ``scored``), ties as in ``order``."""
    dense = np.zeros(len(order))
    dense[scored] = score
    dense[seen] = -1.0
    top, best = np.full(TOP, -1, np.int32), np.full(TOP, -1.0)
    for i in order:
        if dense[i] > best[-1]:  # strictly, so that of equal scores the earlier in `order` stays ahead
            place = TOP - 1
            while place > 0 and best[place - 1] < dense[i]:
                top[place], best[place] = top[place - 1], best[place - 1]
                place -= 1
            top[place], best[place] = i, dense[i]
    return top
