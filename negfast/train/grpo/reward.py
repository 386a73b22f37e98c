"""The reward of a generated item, as a sparse table of one batch that is looked up on the device.

The reward of item i for request (u, t) is the sum of `TERMS`: 1 if i is in the future dislikes F, else lambda * max
over j in F of s_u(i, j), capped; minus mu if i is in the future likes P. s_u counts co-dislikes of *other* users than
u. Every item with a reward other than zero is in F, in P, or a neighbour of F, so the table is small and complete.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from negfast.config import Reward
from negfast.data.neighbours import ContentNeighbours, Neighbours, co_dislike_neighbours, similarity_rows
from negfast.data.split import Requests
from negfast.runtime.engine import Engine
from negfast.staging import put


@dataclass(frozen=True)
class RewardSources:
    """What rewards are made of beside the requests' own futures.

    ``neighbours`` are co-dislike neighbours counted before T_valid; ``content`` speaks of items that were co-disliked
    with none of a request's F. None switches a source off.
    """

    settings: Reward
    n_items: int
    neighbours: Neighbours | None
    content: ContentNeighbours | None


def reward_sources(engine: Engine, until: int, settings: Reward | None = None) -> RewardSources:
    """Of an engine's log and items, co-dislikes counted before the day ``until``; ``settings``: the engine's."""
    settings = engine.config.reward if settings is None else settings
    valid_day = engine.data.valid_day
    neighbours = engine.co_dislikes if until == valid_day else co_dislike_neighbours(engine.log, until)
    return RewardSources(settings, engine.log.n_items, neighbours, engine.content)


Entries = tuple[np.ndarray, np.ndarray]  # keys row * I + item int64 [M], each once, and values float32 [M]


def hits(requests: Requests, sources: RewardSources) -> Entries:
    """1 for every item of F."""
    key = _rows(requests.dislike_offsets) * sources.n_items + requests.dislikes
    return key, np.ones(len(key), np.float32)


def collaborative(requests: Requests, sources: RewardSources) -> Entries:
    """lambda times the largest similarity to an item of F, capped, for items that are not in F themselves."""
    settings, n_items = sources.settings, sources.n_items
    keys, values = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.float32)]
    if settings.collab_weight == 0 or len(requests.dislikes) == 0:
        return keys[0], values[0]
    row = _rows(requests.dislike_offsets)
    if sources.neighbours is not None:
        ids, similarity = similarity_rows(sources.neighbours, requests.user[row], requests.dislikes)
        known = (ids >= 0) & (similarity > 0)
        keys.append((row[:, None] * n_items + ids)[known])
        values.append(similarity[known])
    if sources.content is not None:
        ids, similarity = sources.content(requests.dislikes)
        known = ids >= 0
        key = (row[:, None] * n_items + ids)[known]
        absent = ~np.isin(key, keys[-1])  # co-dislikes, where there are any, speak first
        keys.append(key[absent])
        values.append(similarity[known][absent])
    key, entry = np.unique(np.concatenate(keys), return_inverse=True)
    value = np.zeros(len(key), dtype=np.float32)
    np.maximum.at(value, entry, np.minimum(settings.collab_weight * np.concatenate(values), settings.collab_cap))
    missed = ~np.isin(key, hits(requests, sources)[0])
    return key[missed], value[missed]


def liked(requests: Requests, sources: RewardSources) -> Entries:
    """-mu for every item of P."""
    key = _rows(requests.like_offsets) * sources.n_items + requests.likes
    return key, np.full(len(key), -sources.settings.like_penalty, np.float32)


class Term(NamedTuple):
    """A term of the reward, and its name in metrics."""

    name: str
    entries: Callable[[Requests, RewardSources], Entries]


TERMS = (Term("hit", hits), Term("collab", collaborative), Term("liked", liked))
HIT = 0  # the place of the first


@dataclass(frozen=True)
class RewardTable:
    """Rewards of (request row, item) pairs; every other pair earns 0."""

    key: Tensor  # int64 [M + 1], row * I + item ascending; the last is a sentinel
    terms: Tensor  # float32 [M + 1, terms]: of each of ``TERMS``; their sum is the reward
    n_items: int

    def look_up(self, rows: Tensor, items: Tensor) -> Tensor:
        """The reward's terms [..., terms] of items [...] for request rows [...]."""
        wanted = (rows * self.n_items + items).contiguous()
        entry = torch.searchsorted(self.key, wanted)
        return self.terms[entry] * (self.key[entry] == wanted).unsqueeze(-1)


def build_reward_table(requests: Requests, sources: RewardSources, device: torch.device) -> RewardTable:
    """The table of a batch of requests."""
    entries = [term.entries(requests, sources) for term in TERMS]
    key = np.unique(np.concatenate([keys for keys, _ in entries]))
    terms = np.zeros((len(key) + 1, len(TERMS)), dtype=np.float32)
    for column, (keys, values) in enumerate(entries):
        terms[np.searchsorted(key, keys), column] = values
    key = np.append(key, np.iinfo(np.int64).max)
    return RewardTable(put(key, device), put(terms, device), sources.n_items)


def _rows(offsets: np.ndarray) -> np.ndarray:
    """The request of each item of a ragged list, int64."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
