"""What an evaluation asks of one split, made once: requests, filter events and matched pools."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numba
import numpy as np

from negfast.data.features import HistoryFeatures
from negfast.data.log import DISLIKE, EventLog, past_dislikes
from negfast.data.split import (
    Requests,
    Split,
    UserDays,
    draw_users,
    first_dislike_events,
    first_of_week,
    next_dislikes,
    sample_pairs,
)
from negfast.errors import InputError
from negfast.runtime.engine import Engine
from negfast.runtime.verdict import Candidates

POOL = 100  # the disliked item and 99 others
EVENTS_A_REQUEST, POOLS_A_REQUEST = 20, 2  # of a sampled set, for each request that is asked for (negfast's choice)


@dataclass(frozen=True)
class ChoosingSet:
    """What training asks of valid: R requests with future dislikes, E filter events.

    The context of a request is what came before its moment; that of a filter event what came before
    ``filter_moment``. Users are indices in the log.
    """

    name: str  # "valid" or "test"
    context: str  # of the filter: "day" or "event"
    asked: UserDays  # R requests with non-empty F, sorted by (day, user)
    filter_user: np.ndarray  # int32 [E]
    filter_item: np.ndarray  # int32 [E]
    filter_moment: np.ndarray  # int64 [E], of the event in the context, itself not seen (`EventLog.moments`)
    filter_dislike: np.ndarray  # bool [E], the label


@dataclass(frozen=True)
class EvalSet(ChoosingSet):
    """The same with the requests' futures, and N matched pools, which have the context of their request."""

    requests: Requests  # ``asked``
    primary: np.ndarray  # bool [R], a user's first such request of each week
    next_dislike: np.ndarray  # int32 [R], the item of F disliked first (of equal times the first in the log)
    past_dislike: np.ndarray  # bool [R], whether the user disliked anything up to t
    cold_item: np.ndarray  # bool [I], no event before the valid day
    filter_past_dislike: np.ndarray  # bool [E], whether the user disliked anything before that moment
    pool_request: np.ndarray  # int32 [N], row of ``requests`` whose context counts
    pool_items: np.ndarray  # int32 [N, POOL], the disliked item first
    pools_redrawn: int  # pools with fewer than 99 events to draw from, so drawn with replacement
    pools_dropped: int  # pairs left out because nobody else consumed anything unknown to the user that day
    drawn_from: dict[str, int] | None  # requests, users and filter events of the split, where its users were drawn

    def of_filter(self) -> "EvalSet":
        """The same without requests and pools."""
        requests = np.zeros(0, np.int64)
        return replace(
            self,
            asked=self.asked.only(requests),
            requests=self.requests.take(requests),
            primary=self.primary[:0],
            next_dislike=self.next_dislike[:0],
            past_dislike=self.past_dislike[:0],
            pool_request=self.pool_request[:0],
            pool_items=self.pool_items[:0],
        )

    @property
    def pool_user(self) -> np.ndarray:
        """int32 [N]."""
        return self.requests.user[self.pool_request]

    @property
    def pool_day(self) -> np.ndarray:
        """int32 [N], the last day of each pool's context."""
        return self.requests.day[self.pool_request]

    @property
    def pool_moment(self) -> np.ndarray:
        """int64 [N], seconds: each pool's context is every event before it."""
        return self.requests.moment[self.pool_request]


@dataclass(frozen=True)
class SetColumns:
    """What the features say of the questions of an `EvalSet`, float32."""

    of_filter: np.ndarray  # [E, C]
    of_pools: np.ndarray  # [N * POOL, C], one pool after the other


def set_columns(features: HistoryFeatures, evalsets: Sequence[EvalSet]) -> list[SetColumns]:
    """Those of some sets, by one replay of the log."""
    asked = [part for evalset in evalsets for part in (filter_candidates(evalset), pool_candidates(evalset))]
    whole = (np.concatenate([getattr(part, name) for part in asked]) for name in ("user", "item", "moment"))
    parts = np.split(features.rich(*whole), np.cumsum([len(part) for part in asked])[:-1])
    return [SetColumns(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def filter_candidates(evalset: ChoosingSet) -> Candidates:
    """The filter events."""
    return Candidates(evalset.filter_user, evalset.filter_item, evalset.filter_moment)


def pool_candidates(evalset: EvalSet) -> Candidates:
    """The items of the matched pools, one pool after the other."""
    user, moment = np.repeat(evalset.pool_user, POOL), np.repeat(evalset.pool_moment, POOL)
    return Candidates(user, evalset.pool_items.reshape(-1), moment)


def valid_set(engine: Engine) -> ChoosingSet:
    """What training asks of valid, in the engine's context."""
    return choosing_set(engine.log, engine.split, "valid", engine.config.history.context)


def engine_set(engine: Engine, name: str) -> EvalSet:
    """The evaluation set of split ``name`` of the engine's data, in its context and of the size that is set."""
    config = engine.config
    return evaluation_set(engine.log, engine.split, name, context=config.history.context, most=config.eval.requests)


def evaluation_set(
    log: EventLog, split: Split, name: str, seed: int = 0, context: str = "day", most: int = 0
) -> EvalSet:
    """Makes the evaluation set of split ``name``: its `choosing_set`, and a pool of every distinct (user, item of F),
    with the context of the latest request that has it in F.

    Where the split has more than ``most`` requests (0: no bound), or `EVENTS_A_REQUEST` times as many filter events,
    everything is of users drawn by a hash of their index, the fewest that reach one of both. Of more pools than
    `POOLS_A_REQUEST` times ``most`` that many are drawn. Raises InputError where there is no filter event, or
    the users drawn have no request.
    """
    chosen, drawn_from = choosing_set(log, split, name, context), None
    if most:
        chosen, drawn_from = _of_drawn_users(chosen, most)
    if drawn_from is not None and not len(chosen.asked):
        raise InputError(f"eval.requests={most}: the users drawn of {name} have no request with a dislike ahead")
    requests = chosen.asked.take()
    cold = np.ones(log.n_items, dtype=bool)
    cold[log.item[log.before(split.valid_day)]] = False
    pool_request, pool_items, redrawn, dropped = _pools(log, requests, seed, most * POOLS_A_REQUEST)
    return EvalSet(
        **vars(chosen),
        drawn_from=drawn_from,
        requests=requests,
        primary=first_of_week(requests, _start(split, name)),
        next_dislike=next_dislikes(log, requests),
        past_dislike=past_dislikes(log, requests.user, requests.moment) > 0,
        cold_item=cold,
        filter_past_dislike=past_dislikes(log, chosen.filter_user, chosen.filter_moment) > 0,
        pool_request=pool_request,
        pool_items=pool_items,
        pools_redrawn=redrawn,
        pools_dropped=dropped,
    )


def choosing_set(log: EventLog, split: Split, name: str, context: str = "day") -> ChoosingSet:
    """What is asked of split ``name`` ("valid" or "test"), its filter in ``context`` ("day" or "event").

    Filter events are the first like or dislike of each user-item pair from the split's first day on, for valid
    up to the test day; a mere exposure is neither and is not scored (negfast's choice). Raises InputError where there
    is none.
    """
    asked = ~log.before(_start(split, name))
    if name == "valid":
        asked &= log.before(split.test_day)
    events = np.flatnonzero(log.first_judged & asked)
    if len(events) == 0:
        raise InputError(f"evaluation: {name} has no first like or dislike, expected at least one")
    user, item, moment = log.user[events], log.item[events], log.moments(context, events)
    order = np.lexsort((item, user, moment))
    days: UserDays = getattr(split, name)
    return ChoosingSet(
        name=name,
        context=context,
        asked=days.only(days.has_dislikes),
        filter_user=user[order],
        filter_item=item[order],
        filter_moment=moment[order],
        filter_dislike=log.feedback[events[order]] == DISLIKE,
    )


def _of_drawn_users(whole: ChoosingSet, most: int) -> tuple[ChoosingSet, dict[str, int] | None]:
    """What is asked of users that `evaluation_set` draws, and how much there is; None where they are all."""
    users = np.unique(np.concatenate([whole.asked.user, whole.filter_user]))
    of_request, of_event = (np.searchsorted(users, of) for of in (whole.asked.user, whole.filter_user))
    requests, events = (np.bincount(of, minlength=len(users)) for of in (of_request, of_event))
    drawn = draw_users(users, ((requests, most), (events, most * EVENTS_A_REQUEST)))
    if len(drawn) == len(users):
        return whole, None
    asked, scored = (np.isin(users, drawn)[of] for of in (of_request, of_event))
    part = replace(
        whole,
        asked=whole.asked.only(asked),
        filter_user=whole.filter_user[scored],
        filter_item=whole.filter_item[scored],
        filter_moment=whole.filter_moment[scored],
        filter_dislike=whole.filter_dislike[scored],
    )
    return part, {"requests": len(of_request), "users": len(np.unique(of_request)), "filter_events": len(of_event)}


def _start(split: Split, name: str) -> int:
    return {"valid": split.valid_day, "test": split.test_day}[name]


def check_choosable(valid: ChoosingSet) -> None:
    """InputError where valid cannot choose weights and calibrate: it needs likes, dislikes, and a request with F."""
    dislikes, events = int(valid.filter_dislike.sum()), len(valid.filter_dislike)
    if not 0 < dislikes < events or not len(valid.asked):
        raise InputError(
            f"{valid.name}: found {dislikes} dislikes among {events} first likes and dislikes, and "
            f"{len(valid.asked)} requests with a dislike ahead; expected both kinds and a request: prepare the data "
            "with other --valid and --test dates"
        )


def _pools(log: EventLog, requests: Requests, seed: int, most: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Pools of the distinct (user, item of F) pairs, at most ``most`` of them (0: all), sorted by (request, item):
    requests, items, redrawn, dropped.

    The 99 others are the items of 99 *events*, drawn without replacement from that day's events on items that
    the user has no event with at any time. An item consumed by many is drawn as often as it is consumed: so the
    target and its competitors have the same exposure, and a score that knows only exposure stays near 0.5.
    """
    row = np.repeat(np.arange(len(requests)), np.diff(requests.dislike_offsets))[::-1]  # latest request first
    target = requests.dislikes[::-1]
    _, latest = np.unique(requests.user[row].astype(np.int64) * log.n_items + target, return_index=True)
    row, target = row[latest], target[latest]
    if most:
        drawn = sample_pairs(requests.user[row], target, most)
        row, target = row[drawn], target[drawn]
    order = np.lexsort((target, row))
    row, target = row[order], target[order]

    user = requests.user[row]
    days = log.day
    day = days[first_dislike_events(log, user, target)]
    by_day = np.argsort((days - days.min()).astype(np.uint16), kind="stable")  # a radix sort, as in `user_days`
    users = np.unique(user)
    own, _ = log.of_users(users)
    by_user = np.lexsort((own.item, own.user))
    order = np.argsort(day, kind="stable")  # counts per item are made once a day
    items, eligible = np.empty((len(row), POOL), np.int32), np.empty(len(row), np.int64)
    items[order], eligible[order] = _draw(
        user[order],
        np.searchsorted(users, user[order]),
        target[order],
        np.searchsorted(days[by_day], day[order], side="left"),
        np.searchsorted(days[by_day], day[order], side="right"),
        log.item[by_day],
        own.user_offsets,
        own.item[by_user],
        log.n_items,
        seed,
    )
    kept = eligible > 0
    return row[kept].astype(np.int32), items[kept], int((eligible[kept] < POOL - 1).sum()), int((~kept).sum())


@numba.njit(cache=True)
def _draw(user, place, target, begin, end, day_item, user_offsets, user_item, n_items, seed):
    """Pools [N, POOL] and the number of events that each could draw from; rejection sampling, a seed a pair. ``place``
    is the user's in ``user_offsets``."""
    n = len(user)
    pools = np.zeros((n, POOL), np.int32)
    eligible = np.zeros(n, np.int64)
    count = np.zeros(n_items, np.int64)
    drawn = np.empty(POOL, np.int64)
    for p in range(n):
        if p == 0 or begin[p] != begin[p - 1]:
            count[:] = 0
            for event in range(begin[p], end[p]):
                count[day_item[event]] += 1
        own = user_item[user_offsets[place[p]] : user_offsets[place[p] + 1]]  # ascending, may repeat
        eligible[p] = end[p] - begin[p]
        for k in range(len(own)):
            if k == 0 or own[k] != own[k - 1]:
                eligible[p] -= count[own[k]]
        if eligible[p] == 0:
            continue
        pools[p, 0] = target[p]
        state = _mix(_mix(_mix(np.uint64(seed)) ^ np.uint64(user[p])) ^ np.uint64(target[p]))
        size = 1
        while size < POOL:
            state = _mix(state)
            event = begin[p] + np.int64(state % np.uint64(end[p] - begin[p]))
            candidate = day_item[event]
            k = np.searchsorted(own, candidate)
            if k < len(own) and own[k] == candidate:
                continue
            if eligible[p] >= POOL - 1 and (drawn[1:size] == event).any():
                continue
            drawn[size] = event
            pools[p, size] = candidate
            size += 1
    return pools, eligible


@numba.njit(cache=True)
def _mix(state):
    """One step of splitmix64."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
