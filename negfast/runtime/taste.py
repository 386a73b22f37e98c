"""Lists of a user's own dislikes: what they, rather than others, would dislike of what is shown to all.

An item's score is log P(dislike) + w * lift - price. P(dislike) is the verdict's. The lift says how much more the user
goes for items of this kind, those with the same first code, than everybody does: the policy's logit of that code as the
next like, to which the community prior is only added. So of items that all meet alike, those come first that this user
is most likely to meet and dislike. What nearly everybody dislikes would still be first for nearly everybody: its price
is the least that keeps every item on no more than a share of the lists, see `CAPS` (negfast's choice; on valid pools
of MovieTweetings further codes do no better, and the prices cost nothing).
"""

import numpy as np
import torch

from negfast.data.log import DAY, EventLog
from negfast.runtime.engine import Engine
from negfast.runtime.generation import REQUESTS_AT_ONCE
from negfast.runtime.verdict import Candidates, candidate_logits
from negfast.staging import put

LIFT_WEIGHT = 0.5  # w; of .3 to 1 the best on MovieTweetings' valid pools, mean of three seeds
POPULAR = 500  # items that are ranked for everybody
CAPS = ((1, 0.05), (10, 0.2))  # of the first so many places an item has at most this share of the users'
REFERENCE = 256  # users that prices are set by
PAIRS_AT_ONCE = 1 << 18  # of users and items, whose features are in memory together
PRICE_STEP, PRICE_STEPS = 0.5, 500  # of an item on too many lists, by the share too much


class Taste:
    """Ranks the `POPULAR` items, or ``most`` if that is more, with most events of late at the end of a day."""

    def __init__(self, engine: Engine, day: int, most: int = 0, excluded: np.ndarray | None = None) -> None:
        """``day`` since 1970; items of ``excluded`` (indices) are left out."""
        self.engine, self.moment = engine, (day + 1) * DAY
        self.shown = popular_items(engine.log, day, max(POPULAR, most), engine.config.prior.half_life_days, excluded)
        self.price = np.zeros(len(self.shown))  # of each item shown
        active = np.unique(engine.log.user[engine.log.day <= day])
        drawn = np.random.default_rng(0).permutation(active)[:REFERENCE]
        self.price = list_prices(self._scores(np.sort(drawn)))

    def lists(self, users: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """The first ``top`` items of each of ``users`` int [U] that the user has no event with: int32 [U, top] and
        scores float32 [U, top]; -1 and -inf pad rows with fewer."""
        items = np.full((len(users), top), -1, np.int32)
        scores = np.full((len(users), top), -np.inf, np.float32)
        at_once = max(1, PAIRS_AT_ONCE // max(len(self.shown), 1))
        for start in range(0, len(users), at_once):
            found = self._scores(users[start : start + at_once])
            best = np.argsort(-found, axis=1, kind="stable")[:, :top]  # ties go to the more popular item
            score = np.take_along_axis(found, best, 1)
            rows, columns = slice(start, start + len(found)), slice(best.shape[1])
            items[rows, columns] = np.where(np.isfinite(score), self.shown[best], -1)
            scores[rows, columns] = score
        return items, scores

    def _scores(self, users: np.ndarray) -> np.ndarray:
        """Scores float64 [U, items shown], -inf where the user has an event with the item."""
        unseen = ~seen_before(self.engine.log, users, self.moment, self.shown)
        row, column = np.nonzero(unseen)
        asked = Candidates(users[row].astype(np.int32), self.shown[column], np.full(len(row), self.moment))
        found = np.full(unseen.shape, -np.inf)
        if unseen.any():
            found[unseen] = taste_scores(self.engine, asked)
        return found - self.price


def taste_scores(engine: Engine, candidates: Candidates) -> np.ndarray:
    """Scores without prices, float64 [E], comparable among the candidates of a user and moment."""
    logit = candidate_logits(engine, candidates)
    return LIFT_WEIGHT * kind_lifts(engine, candidates) - np.logaddexp(0.0, -logit)


@torch.inference_mode()
def kind_lifts(engine: Engine, candidates: Candidates) -> np.ndarray:
    """How much more likely the first code of each candidate is as the user's next like than by the community prior:
    logarithm, up to a constant of the user and moment, float64 [E]."""
    out = np.empty(len(candidates))
    order = np.lexsort((candidates.moment, candidates.user))  # those of a user share histories
    user, moment = candidates.user[order], candidates.moment[order]
    begins = np.flatnonzero((np.diff(user, prepend=-1) != 0) | (np.diff(moment, prepend=-1) != 0))
    ends = np.append(begins[1:], len(order))
    for start in range(0, len(begins), REQUESTS_AT_ONCE):
        first, end = begins[start : start + REQUESTS_AT_ONCE], ends[start : start + REQUESTS_AT_ONCE]
        histories = engine.histories.build(user[first], moment[first])
        log_p = engine.policy.code_logits(histories.start(engine.policy, "next-like"), 1).log_softmax(-1)
        places = order[first[0] : end[-1]]
        request = put(np.repeat(np.arange(len(first)), end - first), engine.device)
        code = put(engine.trie.codes[candidates.item[places], 0].astype(np.int64), engine.device)
        out[places] = log_p[request, code].double().cpu().numpy()
    return out


def list_prices(scores: np.ndarray) -> np.ndarray:
    """The prices that keep the `CAPS`, float64 [C], for scores float64 [U, C] (-inf: not listed).

    Dual ascent: an item on too many lists gets dearer until none is. Where there are too few items for a cap, it is
    twice the least share possible.
    """
    n_users, n_items = scores.shape
    price = np.zeros(n_items)
    if not n_users or not n_items:
        return price
    for _ in range(PRICE_STEPS):
        excess = np.zeros(n_items)
        for places, share in CAPS:
            first = min(places, n_items)
            listed = np.argpartition(price - scores, first - 1, axis=1)[:, :first]
            real = np.isfinite(np.take_along_axis(scores, listed, 1))  # who has seen most items has a short list
            lists = np.bincount(listed[real], minlength=n_items) / n_users
            excess = np.maximum(excess, lists - max(share, 2 * first / n_items))
        if not excess.any():
            break
        price += PRICE_STEP * excess
    return price


def popular_items(
    log: EventLog, day: int, most: int, half_life_days: float, excluded: np.ndarray | None = None
) -> np.ndarray:
    """The ``most`` items with most events up to the end of ``day``, an event half as heavy ``half_life_days`` later,
    int32 [at most ``most``]: most popular first, without items of no event and those of ``excluded``."""
    events = log.day <= day
    age = (day - log.day[events]).astype(np.float64)
    mass = np.bincount(log.item[events], np.exp2(-age / half_life_days), log.n_items)
    if excluded is not None:
        mass[excluded] = 0.0
    return np.argsort(-mass, kind="stable")[: min(most, np.count_nonzero(mass))].astype(np.int32)


def seen_before(log: EventLog, users: np.ndarray, moment: int, items: np.ndarray) -> np.ndarray:
    """Which of ``items`` int [C] each of ``users`` int [U] has an event with before ``moment``, bool [U, C]."""
    column = np.full(log.n_items, -1)
    column[items] = np.arange(len(items))
    counts = np.diff(log.user_offsets)[users]
    row = np.repeat(np.arange(len(users)), counts)
    event = np.arange(counts.sum()) + np.repeat(log.user_offsets[:-1][users] - np.cumsum(counts) + counts, counts)
    place = column[log.item[event]]
    known = (log.time[event] < moment) & (place >= 0)
    out = np.zeros((len(users), len(items)), bool)
    out[row[known], place[known]] = True
    return out
