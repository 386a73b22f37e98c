"""The reward of a generated item, as a sparse table of one batch that is looked up on the device.

Reward of item i for request (u, t): 1 if i is in the future dislikes F, else lambda * max over j in F of s_u(i, j),
capped; minus mu if i is in the future likes P. s_u counts co-dislikes of *other* users than u. Every item with a
reward other than zero is in F, in P, or a neighbour of F, so the table is small and complete.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negfast.config import Reward
from negfast.data.neighbours import Neighbours, similarity_rows
from negfast.data.split import Requests
from negfast.staging import put

HIT, COLLABORATIVE, LIKED = 0, 1, 2  # terms of the reward


@dataclass(frozen=True)
class RewardTable:
    """Rewards of (request row, item) pairs; every other pair earns 0."""

    key: Tensor  # int64 [M + 1], row * I + item ascending; the last is a sentinel
    terms: Tensor  # float32 [M + 1, 3]: hit, collaborative, liked; their sum is the reward
    n_items: int

    def look_up(self, rows: Tensor, items: Tensor) -> Tensor:
        """The reward's terms [..., 3] of items [...] for request rows [...]."""
        wanted = (rows * self.n_items + items).contiguous()
        entry = torch.searchsorted(self.key, wanted)
        return self.terms[entry] * (self.key[entry] == wanted).unsqueeze(-1)


def build_reward_table(
    requests: Requests,
    n_items: int,
    config: Reward,
    neighbours: Neighbours | None,
    content: tuple[np.ndarray, np.ndarray] | None,
    device: torch.device,
) -> RewardTable:
    """The table of a batch of requests.

    ``neighbours`` are co-dislike neighbours counted before T_valid; ``content`` = (ids int32 [I, N], similarity float32
    [I, N]) speaks of items that were co-disliked with none of a request's F. None switches a source off.
    """
    row_of_dislike = np.repeat(np.arange(len(requests)), np.diff(requests.dislike_offsets))
    row_of_like = np.repeat(np.arange(len(requests)), np.diff(requests.like_offsets))
    hit_key = row_of_dislike * n_items + requests.dislikes
    near_key, near_value = _near(requests, row_of_dislike, n_items, config, neighbours, content)
    liked_key = row_of_like * n_items + requests.likes

    key = np.unique(np.concatenate([hit_key, near_key, liked_key]))
    terms = np.zeros((len(key) + 1, 3), dtype=np.float32)
    np.maximum.at(terms[:, COLLABORATIVE], np.searchsorted(key, near_key), near_value)
    hits = np.searchsorted(key, hit_key)
    terms[hits, HIT], terms[hits, COLLABORATIVE] = 1.0, 0.0
    terms[np.searchsorted(key, liked_key), LIKED] = -config.like_penalty
    key = np.append(key, np.iinfo(np.int64).max)
    return RewardTable(put(key, device), put(terms, device), n_items)


def _near(
    requests: Requests,
    row_of_dislike: np.ndarray,
    n_items: int,
    config: Reward,
    neighbours: Neighbours | None,
    content: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """(key, reward) of items near a future dislike; keys repeat where an item is near several."""
    keys, values = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.float32)]
    if config.collab_weight == 0 or len(requests.dislikes) == 0:
        return keys[0], values[0]
    if neighbours is not None:
        ids, similarity = similarity_rows(neighbours, requests.user[row_of_dislike], requests.dislikes)
        known = (ids >= 0) & (similarity > 0)
        keys.append((row_of_dislike[:, None] * n_items + ids)[known])
        values.append(similarity[known])
    if content is not None:
        ids, similarity = content[0][requests.dislikes], content[1][requests.dislikes]
        known = ids >= 0
        key = (row_of_dislike[:, None] * n_items + ids)[known]
        absent = ~np.isin(key, keys[-1])  # co-dislikes, where there are any, speak first
        keys.append(key[absent])
        values.append(similarity[known][absent])
    reward = np.minimum(config.collab_weight * np.concatenate(values), config.collab_cap)
    return np.concatenate(keys), reward.astype(np.float32)
