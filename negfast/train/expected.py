"""What a policy expects to earn: exact log-probabilities of given items, and the mean reward without sampling."""

from collections.abc import Sequence

import numpy as np
import torch

from negfast.config import Reward
from negfast.data.log import DAY, EventLog
from negfast.data.split import Requests
from negfast.model.histories import MIXED
from negfast.runtime.engine import Engine
from negfast.runtime.generation import REQUESTS_AT_ONCE
from negfast.runtime.likelihood import Targets, log_probs_by_scale
from negfast.sid.prior import NEXT_DISLIKE
from negfast.train.grpo.reward import RewardTable, build_reward_table, reward_sources

TARGETS_AT_ONCE = 8192


@torch.no_grad()
def item_log_probs(
    engine: Engine,
    user: np.ndarray,
    day: np.ndarray,
    offsets: np.ndarray,
    items: np.ndarray,
    view: int = MIXED,
    scales: Sequence[float] = (),
) -> np.ndarray:
    """log p(item | context, next-dislike), exact on the trie, of ragged lists of items: float64 [scales, len(items)],
    under each scale of the code logits. By default it is the policy's own.

    Request r is (``user[r]``, ``day[r]``), int32 [R]; its items are ``items[offsets[r]:offsets[r + 1]]``, int32, unseen
    by the user up to that day.
    """
    scales = scales or (float(engine.policy.block.scale),)
    out = np.empty((len(scales), len(items)))
    counts = np.diff(offsets)
    marker = engine.policy.vocabulary.marker("next-dislike")
    order = np.lexsort((day, user))  # those of a user share histories
    for rows in np.split(order, _cuts(counts[order], REQUESTS_AT_ONCE)):
        if not (total := int(counts[rows].sum())):
            continue
        places = np.arange(total) + np.repeat(offsets[rows] - np.cumsum(counts[rows]) + counts[rows], counts[rows])
        histories = engine.histories.build(user[rows], (day[rows].astype(np.int64) + 1) * DAY, view)
        targets = torch.from_numpy(items[places]).to(engine.device).long()
        markers = torch.full_like(targets, marker)
        asked = Targets(histories, np.repeat(np.arange(len(rows)), counts[rows]), markers, targets)
        log_p = log_probs_by_scale(engine, asked, histories.prior, NEXT_DISLIKE, scales)
        out[:, places] = log_p.double().cpu().numpy()
    return out


def expected_rewards(engine: Engine, requests: Requests, table: RewardTable, view: int = MIXED) -> np.ndarray:
    """Each request's expected reward of one item drawn from the policy, float64 [R].

    The sum over the unseen items of p(item) * reward(item), without sampling: ``table`` holds every item whose reward
    is not zero, its rows those of ``requests``, as `reward_table` makes it.
    """
    key = table.key[:-1].cpu().numpy()
    reward = table.terms[:-1].sum(-1).double().cpu().numpy()
    row, item = key // table.n_items, (key % table.n_items).astype(np.int32)
    counted = (reward != 0) & ~_seen(engine.log, requests.user[row], requests.day[row], item)
    row, item, reward = row[counted], item[counted], reward[counted]
    offsets = np.searchsorted(row, np.arange(len(requests) + 1))
    [log_p] = item_log_probs(engine, requests.user, requests.day, offsets, item, view)
    probability = np.exp(log_p)
    return np.bincount(row, probability * reward, len(requests))


def reward_table(engine: Engine, requests: Requests, settings: Reward | None = None) -> RewardTable:
    """The rewards of ``requests`` by ``settings`` (default: the engine's), co-dislikes counted before T_valid."""
    return build_reward_table(requests, reward_sources(engine, engine.data.valid_day, settings), engine.device)


def _cuts(counts: np.ndarray, most: int) -> list[int]:
    """Where to cut rows with so many targets each into batches of at most ``most`` rows and `TARGETS_AT_ONCE`
    targets; a row with more is a batch of its own."""
    cuts, start, targets = [], 0, 0
    for row, count in enumerate(counts.tolist()):
        if row > start and (row - start == most or targets + count > TARGETS_AT_ONCE):
            cuts.append(row)
            start, targets = row, 0
        targets += count
    return cuts


def _seen(log: EventLog, user: np.ndarray, day: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Whether each user had an event with the item up to the end of the day, bool, one for each (user, day, item)."""
    users, user = np.unique(user, return_inverse=True)
    theirs, _ = log.of_users(users)
    pairs, first = np.unique(theirs.pair, return_index=True)
    wanted = user * log.n_items + item
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    return (pairs[place] == wanted) & (theirs.day[first[place]] <= day)  # a user's events are in order of time
