"""Baselines that rank all items alike for everyone: popularity, recency and decay at the end of each day."""

from collections.abc import Iterator, Sequence

import numba
import numpy as np

from negfast.data.log import DISLIKE, EventLog, history_ends
from negfast.data.split import Requests
from negfast.evaluate.predictions import TOP, Predictions
from negfast.evaluate.sets import EvalSet

RANKINGS = ("popularity", "recent-7d", "recent-14d", "decay-4d", "recent-all-14d")
HALF_LIFE = 4.0  # days; chosen on MovieTweetings' valid split


def ranking_predictions(log: EventLog, evalsets: Sequence[EvalSet]) -> list[dict[str, Predictions]]:
    """Generated items and pool scores of all of `RANKINGS`, in one sweep over the days; nothing is fitted."""
    wanted = np.unique(np.concatenate([evalset.requests.day for evalset in evalsets]))
    predictions = [
        {
            name: Predictions(
                generated=np.full((len(evalset.requests), TOP), -1, np.int32),
                pool_score=np.zeros(evalset.pool_items.shape),
                kind="baseline",
            )
            for name in RANKINGS
        }
        for evalset in evalsets
    ]
    for day, scores, events in day_scores(log, wanted):
        most = TOP + longest_history(log, [evalset.requests for evalset in evalsets], day)
        orders = {name: first_items(score, events, most) for name, score in scores.items()}
        for evalset, of_set in zip(evalsets, predictions, strict=True):
            rows = np.flatnonzero(evalset.requests.day == day)
            pools = np.flatnonzero(evalset.pool_day == day)
            requests = evalset.requests.take(rows)
            for name in RANKINGS:
                ranking = of_set[name]
                assert ranking.generated is not None and ranking.pool_score is not None
                ranking.generated[rows] = first_unseen(log, requests, orders[name])
                ranking.pool_score[pools] = scores[name][evalset.pool_items[pools]]
    return predictions


def day_scores(log: EventLog, days: np.ndarray) -> Iterator[tuple[int, dict[str, np.ndarray], np.ndarray]]:
    """For each of ``days`` (ascending): the day, each ranking's score and the number of events of every item.

    All float64 [I], counted up to the end of the day (a repeated dislike counts again) and overwritten by the next.
    """
    if not len(days):
        return
    order = np.argsort(log.time, kind="stable")
    item, dislike, event_day = log.item[order], log.feedback[order] == DISLIKE, log.day[order]
    first = int(event_day[0])
    n_days = int(days[-1]) - first + 1
    starts = np.searchsorted(event_day, first + np.arange(n_days + 1))

    def of_day(k: int, only_dislikes: bool) -> np.ndarray:
        today = slice(starts[k], starts[k + 1])
        chosen = item[today][dislike[today]] if only_dislikes else item[today]
        return np.bincount(chosen, minlength=log.n_items).astype(np.float64)

    events, popularity, week, fortnight, fortnight_all, decayed = np.zeros((6, log.n_items))
    wanted = set(days.tolist())
    for k in range(n_days):
        disliked, any_event = of_day(k, True), of_day(k, False)
        events += any_event
        popularity += disliked
        decayed *= 0.5 ** (1 / HALF_LIFE)
        decayed += disliked
        week += disliked
        fortnight += disliked
        fortnight_all += any_event
        if k >= 7:
            week -= of_day(k - 7, True)
        if k >= 14:
            fortnight -= of_day(k - 14, True)
            fortnight_all -= of_day(k - 14, False)
        if first + k in wanted:
            scores = {
                "popularity": popularity,
                "recent-7d": week,
                "recent-14d": fortnight,
                "decay-4d": decayed,
                "recent-all-14d": fortnight_all,
            }
            yield first + k, scores, events


def longest_history(log: EventLog, requests: Sequence[Requests], day: int) -> int:
    """The most events that a user of the requests of ``day`` has had by then."""
    users = np.concatenate([of.user[of.day == day] for of in requests])
    ends = history_ends(log, users, np.full(len(users), day))
    return int((ends - log.user_offsets[users]).max(initial=0))


def first_items(score: np.ndarray, events: np.ndarray, most: int) -> np.ndarray:
    """The first ``most`` items in the order of score, then of events (both float64 [I], descending), then of index,
    int32; items that cannot be among them are not sorted."""
    items = np.arange(len(score))
    if most < len(items):
        last = np.partition(score, -most)[-most]
        above, level = np.flatnonzero(score > last), np.flatnonzero(score == last)
        wanted = most - len(above)
        fewest = np.partition(events[level], -wanted)[-wanted]
        items = np.sort(np.concatenate([above, level[events[level] >= fewest]]))
    return items[np.lexsort((-events[items], -score[items]))][:most].astype(np.int32)


def first_unseen(log: EventLog, requests: Requests, order: np.ndarray) -> np.ndarray:
    """The first `TOP` items of ``order`` (int32) that each request's user has no event with up to t."""
    end = history_ends(log, requests.user, requests.day)
    return _first_unseen(log.user_offsets[requests.user], end, log.item, order, log.n_items)


@numba.njit(cache=True)
def _first_unseen(begin, end, item, order, n_items):
    out = np.full((len(begin), TOP), -1, np.int32)
    seen_by = np.full(n_items, -1, np.int64)
    for row in range(len(begin)):
        for event in range(begin[row], end[row]):
            seen_by[item[event]] = row
        size = 0
        for i in order:
            if seen_by[i] != row:
                out[row, size] = i
                size += 1
                if size == TOP:
                    break
    return out
