"""Item neighbours: what people who disliked (or consumed) the user's items disliked (consumed) too."""

from collections.abc import Sequence

import numba
import numpy as np
from scipy import sparse

from negfast.data.log import DISLIKE, EventLog, history_ends
from negfast.data.split import Requests, draw_users
from negfast.evaluate.baselines.ranking import day_scores, first_items, longest_history
from negfast.evaluate.predictions import TOP, Predictions
from negfast.evaluate.sets import EvalSet

PAIRS = 1 << 24  # of items that users consumed, counted in full up to here (negfast's choice)
MOST_ITEMS, MOST_NEIGHBOURS = 1000, 200  # beyond: of a user who is drawn, and kept of an item (negfast's choice)
_BLOCK = 512  # requests scored at a time, which bounds the memory for scores

Day = tuple[np.ndarray, np.ndarray]  # events of every item up to a day, int32 [I], and the items with most of them


def knn_predictions(log: EventLog, evalsets: Sequence[EvalSet], fit_until: int) -> list[dict[str, Predictions]]:
    """``knn-dislikes`` (dislikes as history and as counts) and ``knn-all`` (every event as both).

    The score of item i is the sum over the history's items j of c/(c+5) * c/sqrt((c_i+3)(c_j+3)), where c_i users
    have i and c both, counted before ``fit_until``. Ties: more events up to t first, then the lower index.

    Where users have more than `PAIRS` pairs of items, and there are as many, users of at most `MOST_ITEMS` items are
    drawn by a hash until they have so many, and an item keeps its `MOST_NEIGHBOURS` nearest.
    """
    asked = [evalset.requests for evalset in evalsets]
    days: dict[int, Day] = {}
    for day, _, events in day_scores(log, np.unique(np.concatenate([requests.day for requests in asked]))):
        most = TOP + longest_history(log, asked, day)
        days[day] = events.astype(np.int32), first_items(events, events, most)
    users = np.unique(np.concatenate([requests.user for requests in asked]))
    known = np.zeros(log.n_items, bool)  # what a history may hold
    known[log.of_users(users)[0].item] = True
    predictions: list[dict[str, Predictions]] = [{} for _ in evalsets]
    for name, counted in (("knn-dislikes", log.feedback == DISLIKE), ("knn-all", np.ones(len(log), dtype=bool))):
        rows = np.flatnonzero(counted & log.before(fit_until))
        consumed = _incidence(log.user[rows], log.item[rows], (log.n_users, log.n_items))
        drawn, note = _drawn(consumed)
        similarity = _similarity(consumed if drawn is None else consumed[drawn], np.flatnonzero(known))
        if drawn is not None:
            similarity = _nearest(similarity, MOST_NEIGHBOURS)
        for evalset, of_set in zip(evalsets, predictions, strict=True):
            generated = _generate(log, evalset.requests, counted, similarity, days)
            of_set[name] = Predictions(generated=generated, kind="baseline", note=note)
    return predictions


def _drawn(consumed: sparse.csr_matrix) -> tuple[np.ndarray | None, str]:
    """The users whose items are counted, and what to say of them; None where they are all."""
    items = np.diff(consumed.indptr).astype(np.int64)
    if min((items**2).sum(), consumed.shape[1] ** 2) <= PAIRS:
        return None, ""
    users = np.flatnonzero((items > 0) & (items <= MOST_ITEMS))
    drawn = draw_users(users, [(items[users] ** 2, PAIRS)])
    there = int((items > 0).sum())
    return drawn, f"counts items of {len(drawn):,} of {there:,} users, drawn by a hash; {MOST_NEIGHBOURS} nearest each"


def _generate(
    log: EventLog, requests: Requests, counted: np.ndarray, similarity: sparse.csr_matrix, days: dict[int, Day]
) -> np.ndarray:
    begin = log.user_offsets[requests.user]
    end = history_ends(log, requests.user, requests.day)
    out = np.full((len(requests), TOP), -1, np.int32)
    seen_by = np.full(log.n_items, -1, np.int64)
    block = max(16, min(_BLOCK, PAIRS // log.n_items))
    for start in range(0, len(requests), block):
        rows = np.arange(start, min(start + block, len(requests)))
        counts = end[rows] - begin[rows]
        event = np.arange(counts.sum()) + np.repeat(begin[rows] - np.cumsum(counts) + counts, counts)
        row = np.repeat(np.arange(len(rows)), counts)[counted[event]]
        history = _incidence(row, log.item[event[counted[event]]], (len(rows), log.n_items))
        scores = (history @ similarity).tocsr()
        for k, r in enumerate(rows):
            entries = slice(scores.indptr[k], scores.indptr[k + 1])
            events, busiest = days[int(requests.day[r])]
            seen_by[log.item[begin[r] : end[r]]] = r
            _top_unseen(scores.indices[entries], scores.data[entries], seen_by, r, events, busiest, out[r])
    return out


def _similarity(consumed: sparse.csr_matrix, items: np.ndarray) -> sparse.csr_matrix:
    """Shrunk cosine of ``items`` to every item, [I, I]; the rows of other items are empty."""
    popularity = np.asarray(consumed.sum(axis=0)).ravel()
    together = (consumed[:, items].T @ consumed).tocsr()
    c, row = together.data, np.repeat(items, np.diff(together.indptr))
    value = c / (c + 5) * c / np.sqrt((popularity[row] + 3) * (popularity[together.indices] + 3))
    offsets = np.zeros(len(popularity) + 1, np.int64)
    offsets[items + 1] = np.diff(together.indptr)
    return sparse.csr_matrix((value, together.indices, np.cumsum(offsets)), shape=(len(popularity), len(popularity)))


def _nearest(similarity: sparse.csr_matrix, most: int) -> sparse.csr_matrix:
    """The ``most`` largest entries of each row, and those as large as the last of them."""
    kept = _among_largest(similarity.indptr, similarity.data, most)
    offsets = np.append(0, np.cumsum(kept))[similarity.indptr]
    return sparse.csr_matrix((similarity.data[kept], similarity.indices[kept], offsets), shape=similarity.shape)


@numba.njit(cache=True)
def _among_largest(offsets, values, most):
    kept = np.ones(len(values), np.bool_)
    for row in range(len(offsets) - 1):
        own = values[offsets[row] : offsets[row + 1]]
        if len(own) > most:
            kept[offsets[row] : offsets[row + 1]] = own >= np.partition(own, len(own) - most)[len(own) - most]
    return kept


def _incidence(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """1 where a pair occurs, however often."""
    matrix = sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


@numba.njit(cache=True)
def _top_unseen(scored, score, seen_by, row, events, busiest, out):
    """Fills ``out`` int32 [TOP] with the unseen items of highest score (0 where not ``scored``): those where
    ``seen_by`` is not ``row``, which then tells of those found too; ties by ``events``, as in ``busiest``."""
    size, best = 0, np.empty(TOP)
    for n in range(len(scored)):
        i, place = scored[n], size
        if seen_by[i] == row:
            continue
        while place > 0:
            j = out[place - 1]
            ahead = events[i] > events[j] or (events[i] == events[j] and i < j)
            if not (best[place - 1] < score[n] or (best[place - 1] == score[n] and ahead)):
                break
            place -= 1
        if place == TOP:
            continue
        size = min(size + 1, TOP)
        for k in range(size - 1, place, -1):
            out[k], best[k] = out[k - 1], best[k - 1]
        out[place], best[place] = i, score[n]
    for k in range(size):
        seen_by[out[k]] = row
    for i in busiest:
        if size == TOP:
            break
        if seen_by[i] != row:
            out[size] = i
            size += 1
