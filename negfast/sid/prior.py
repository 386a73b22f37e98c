"""The community prior on the trie: log mass of the unseen items under each child (negfast's choice).

With code logits at zero and weight 1, a walk down the trie draws an unseen item with probability proportional to
its mass + eps. The mass is that of its decayed dislikes (likes, for the next like). One table of node masses a day and
branch lies on the device; what a request has seen is subtracted there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negfast.data.log import EventLog
from negfast.sid.trie import DeviceTrie, SeenNodes, Trie
from negfast.staging import put

NEXT_DISLIKE, NEXT_LIKE = 0, 1  # branches: rows of the mass tables
MARKERS = ("next-dislike", "next-like")  # that ask for them
TABLE_BYTES = 64  # a day and item while the tables are built: two masses and their copies in the trie's order


def decayed_mass(log: EventLog, feedback: int, half_life_days: float, first_day: int, last_day: int) -> np.ndarray:
    """Mass of every item at the end of each day in first_day..last_day, float64 [D, I].

    The events of all users with that feedback count; one of day d weighs 2^-((D - d) / half_life_days) at the end
    of day D >= d and nothing before. Days are UTC days since 1970.
    """
    n_days = last_day - first_day + 1
    counted = (log.feedback == feedback) & (log.day <= last_day)
    day, item = log.day[counted].astype(np.int64), log.item[counted].astype(np.int64)
    row = np.maximum(day - first_day, 0)  # an earlier event enters on the first row, with what is left of it
    weight = np.exp2(-np.maximum(first_day - day, 0) / half_life_days)
    counts = np.bincount(row * log.n_items + item, weight, n_days * log.n_items)
    mass = counts.astype(np.float64).reshape(n_days, log.n_items)  # without events numpy counts integers
    for today in range(1, n_days):
        mass[today] += mass[today - 1] * 2.0 ** (-1.0 / half_life_days)
    return mass


@dataclass(frozen=True)
class RequestPrior:
    """The prior of one batch: day row of each request, and the mass of what it has seen."""

    prior: "DevicePrior"
    seen: SeenNodes
    day_row: Tensor  # int64 [B]
    seen_mass: list[Tensor]  # [l - 1] [2, M_l + 1]: mass of the seen leaves of each entry of ``seen``, per branch


@dataclass(frozen=True)
class DevicePrior:
    """Masses of every trie node at the end of each day, for both branches."""

    first_day: int
    eps: float  # added per unseen leaf, > 0, so that every unseen item keeps some probability
    mass: list[Tensor]  # [l - 1] float32 [2, D, n_l], l = 1..L; leaf order on the last

    @classmethod
    def build(
        cls,
        trie: Trie,
        dislike_mass: np.ndarray,
        like_mass: np.ndarray,
        first_day: int,
        eps: float,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> "DevicePrior":
        """From the masses of items for the next dislike and the next like, float64 [D, I], row 0 at ``first_day``.

        Sums over leaves are made in float64 and stored as ``dtype``.
        """
        if eps <= 0:
            raise ValueError(f"eps must be above 0, found {eps}")
        nodes = np.stack([dislike_mass, like_mass])[..., trie.leaf_item]
        levels = [nodes]
        for first in trie.first_child[:0:-1]:  # from the leaves up to level 1
            nodes = np.add.reduceat(nodes, first[:-1].astype(np.int64), axis=-1)
            levels.append(nodes)
        tensors = [torch.as_tensor(nodes).to(device=device, dtype=dtype) for nodes in reversed(levels)]
        return cls(first_day, eps, tensors)

    def for_requests(self, days: np.ndarray, seen: SeenNodes) -> RequestPrior:
        """The prior of a batch whose request b ends on ``days[b]`` (int [B], days since 1970) and has seen ``seen``.

        Raises ValueError for a day outside the table.
        """
        n_days = self.mass[0].shape[1]
        rows = np.asarray(days, dtype=np.int64) - self.first_day
        if len(rows) and (rows.min() < 0 or rows.max() >= n_days):
            found = f"{rows.min() + self.first_day}..{rows.max() + self.first_day}"
            raise ValueError(f"days {found} are outside {self.first_day}..{self.first_day + n_days - 1}")
        day_row = put(rows, seen.leaf.device)
        of_leaf = self.mass[-1][:, day_row[seen.request], seen.leaf].double()  # [2, S]
        seen_mass = []
        for key, slot in zip(seen.key, seen.slot, strict=True):
            total = torch.zeros(2, len(key), dtype=torch.float64, device=key.device)
            seen_mass.append(total.index_add_(1, slot, of_leaf).to(self.mass[0].dtype))
        return RequestPrior(self, seen, day_row, seen_mass)


def child_log_prior(
    trie: DeviceTrie, prior: RequestPrior, branch: int | Tensor, level: int, nodes: Tensor, request_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """What may follow each node, and its log mass, for R completions in progress.

    ``nodes`` [R] are of a level in 0..L-1, ``request_rows`` [R] their requests, ``branch`` NEXT_DISLIKE or NEXT_LIKE,
    one for all or int64 [R]. Returns (log_mass [R, K] in the table's dtype, valid bool [R, K]): a code is valid
    if the child exists and has an unseen leaf; log_mass = log(max(mass - seen mass, 0) + eps * unseen leaves),
    and 0 where not valid. No synchronisation with the host.
    """
    child, code = trie.child_slots(level, nodes)
    entry, seen_count = prior.seen.find(level + 1, request_rows, child, trie.node_counts[level + 1])
    exists = child >= 0
    child = child.clamp(min=0)
    unseen = trie.leaf_count[level][child] - seen_count
    branches = branch if isinstance(branch, int) else branch[:, None]
    mass = prior.prior.mass[level][branches, prior.day_row[request_rows][:, None], child]
    mass = (mass - prior.seen_mass[level][branches, entry]).clamp(min=0) + prior.prior.eps * unseen.to(mass.dtype)
    valid = exists & (unseen > 0)
    log_mass = torch.where(valid, mass, 1).log()
    return trie.spread(code, log_mass, 0.0), trie.spread(code, valid, False)
