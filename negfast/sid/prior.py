"""The community prior on the trie: log mass of the unseen items under each child (negfast's choice).

With code logits at zero and weight 1, a walk down the trie draws an unseen item with probability proportional to
its mass + eps. The mass is that of its decayed dislikes (likes, for the next like). Masses are kept on the days they
grow, so memory follows the events; what a request has seen is subtracted on the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negfast.data.log import BLOCK_EVENTS, DAY, DISLIKE, LIKE, EventLog, sort_stably
from negfast.sid.trie import DeviceTrie, SeenNodes, Trie
from negfast.staging import put

NEXT_DISLIKE, NEXT_LIKE = 0, 1  # branches, in the order of their masses
FEEDBACK_OF_BRANCH = (DISLIKE, LIKE)
MARKERS = ("next-dislike", "next-like")  # that ask for them


@dataclass(frozen=True)
class DecayedMass:
    """Mass of G groups of events at the end of each of D days: an event of day d weighs 2^-((t - d) / half-life) at the
    end of day t >= d and nothing before.

    There is an entry for each (group, day) with an event, so memory grows with the events, not with G x D.
    """

    days: int  # D; days are counted from 0
    key: Tensor  # int64 [E + 1], group * D + day ascending; the first stands for no event
    mass: Tensor  # float [E + 1], at the end of that day
    decay: Tensor  # float [D + 1]: what an event weighs so many days later; the last is 0, for no event

    @classmethod
    def build(
        cls,
        keys: np.ndarray,
        days: int,
        half_life_days: float,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "DecayedMass":
        """Of events with ``keys`` int64 [N], group * ``days`` + day, in any order; the array is sorted in place.

        Sums are made in float64 and stored as ``dtype``.
        """
        return cls.of_counts(*_counted(keys), days, half_life_days, device, dtype)

    @classmethod
    def of_counts(
        cls,
        key: np.ndarray,
        count: np.ndarray,
        days: int,
        half_life_days: float,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> "DecayedMass":
        """Of ``count`` int [E] events with each ``key`` int64 [E], ascending."""
        decay = np.append(np.exp2(-np.arange(days) / half_life_days), 0.0)
        key = np.append(-days, key)
        mass = _accumulate(key, np.append(0, count), decay)
        floats = (torch.as_tensor(values).to(device=device, dtype=dtype) for values in (mass, decay))
        return cls(days, torch.as_tensor(key).to(device), *floats)

    def at(self, group: Tensor, day: Tensor) -> Tensor:
        """Mass at the end of ``day`` int64 in 0..D-1 for ``group`` int64, shapes broadcast together. No
        synchronisation with the host."""
        wanted = group * self.days + day
        entry = torch.searchsorted(self.key, wanted, right=True) - 1
        age = wanted - self.key[entry]
        return self.mass[entry] * self.decay[age.masked_fill_(age > day, self.days)]  # older: of another group


def _counted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ``keys``, ascending, and how many there are of each, int32; the array is sorted in place."""
    keys.sort()
    first = _firsts(keys)
    return keys[first], np.diff(first, append=len(keys)).astype(np.int32)


def _firsts(keys: np.ndarray) -> np.ndarray:
    """Where another of the ascending ``keys`` begins, int64."""
    return np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])


def _accumulate(key: np.ndarray, count: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """Mass at each entry: its count and what is left of the entry before in the same group; float64 [E].

    The first entries of all groups, then the second ones, ...: numpy, as numba takes half a second to import, for which
    `negfast score` would wait.
    """
    mass = count.astype(np.float64)
    begins = np.flatnonzero(np.diff(key // (len(decay) - 1), prepend=np.iinfo(np.int64).min))
    lengths = np.diff(begins, append=len(key))
    order = np.argsort(-lengths, kind="stable")
    begins, lengths = begins[order], lengths[order]  # longest first: a prefix of them has an entry of any number
    for place in range(1, int(lengths.max(initial=0))):
        at = begins[: np.searchsorted(-lengths, -place)] + place
        mass[at] += mass[at - 1] * decay[key[at] - key[at - 1]]
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

    first_day: int  # days since 1970: day row 0
    eps: float  # added per unseen leaf, > 0, so that every unseen item keeps some probability
    node_counts: list[int]  # n_0 .. n_L
    levels: list[DecayedMass]  # [l - 1], l = 1..L: group branch * n_l + node

    @classmethod
    def build(
        cls,
        trie: Trie,
        log: EventLog,
        half_life_days: float,
        eps: float,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> "DevicePrior":
        """From the likes and dislikes of all users; row 0 is the day before the log's first, on which nothing is known.

        Masses are summed in float64 and stored as ``dtype``.
        """
        if eps <= 0:
            raise ValueError(f"eps must be above 0, found {eps}")
        first_day = int(log.time.min() // DAY) - 1
        days = int(log.time.max() // DAY) - first_day + 1
        key = np.empty(int(np.count_nonzero(log.judged)), np.int64)
        filled = 0
        for begin in range(0, len(log), BLOCK_EVENTS):
            block = slice(begin, begin + BLOCK_EVENTS)
            for branch, feedback in enumerate(FEEDBACK_OF_BRANCH):
                some = log.feedback[block] == feedback
                leaf = trie.item_nodes[log.item[block][some], -1] + np.int64(branch * trie.node_counts[-1])
                key[filled : filled + len(leaf)] = leaf * days + (log.time[block][some] // DAY - first_day)
                filled += len(leaf)
        key, count = _counted(key)
        levels = []
        for level in range(trie.levels, 0, -1):  # those of a level are sums of those of the next
            levels.append(DecayedMass.of_counts(key, count, days, half_life_days, device, dtype))
            if level > 1:
                group, day = np.divmod(key, days)
                side, node = np.divmod(group, trie.node_counts[level])
                parent = np.searchsorted(trie.first_child[level - 1], node, side="right") - 1
                bound = 2 * trie.node_counts[level - 1] * days
                key, order = sort_stably((side * trie.node_counts[level - 1] + parent) * days + day, bound)
                first = _firsts(key)
                count = np.add.reduceat(count[order], first) if len(first) else count
                key = key[first]
        return cls(first_day, eps, trie.node_counts, levels[::-1])

    def mass(self, level: int, branch: int | Tensor, day_row: Tensor, nodes: Tensor) -> Tensor:
        """Mass of ``nodes`` int64 of a level in 1..L at the end of ``day_row`` int64, for ``branch``; shapes broadcast
        together."""
        return self.levels[level - 1].at(branch * self.node_counts[level] + nodes, day_row)

    def for_requests(self, days: np.ndarray, seen: SeenNodes) -> RequestPrior:
        """The prior of a batch whose request b ends on ``days[b]`` (int [B], days since 1970) and has seen ``seen``.

        Raises ValueError for a day outside the log's.
        """
        n_days = self.levels[0].days
        rows = np.asarray(days, dtype=np.int64) - self.first_day
        if len(rows) and (rows.min() < 0 or rows.max() >= n_days):
            found = f"{rows.min() + self.first_day}..{rows.max() + self.first_day}"
            raise ValueError(f"days {found} are outside {self.first_day}..{self.first_day + n_days - 1}")
        day_row = put(rows, seen.leaf.device)
        branch = torch.arange(2, device=seen.leaf.device)[:, None]
        of_leaf = self.mass(len(self.levels), branch, day_row[seen.request], seen.leaf)  # [2, S]
        wide, seen_mass = of_leaf.double().T, []
        for key, slot in zip(seen.key, seen.slot, strict=True):
            total = torch.zeros(len(key), 2, dtype=torch.float64, device=key.device)
            total.index_put_((slot,), wide, accumulate=True)  # on CUDA in order, where index_add_ adds atomically
            seen_mass.append(total.T.to(of_leaf.dtype))
        return RequestPrior(self, seen, day_row, seen_mass)


def child_log_prior(
    trie: DeviceTrie, prior: RequestPrior, branch: int | Tensor, level: int, nodes: Tensor, request_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What may follow each node, and its log mass, for R completions in progress.

    Returns (log_mass [R, K] in the masses' dtype, valid bool [R, K], children int64 [R, K] as `DeviceTrie.children`) of
    all codes: `slot_log_prior` in their columns.
    """
    child, code = trie.child_slots(level, nodes)
    log_mass, valid = slot_log_prior(trie, prior, branch, level, child, request_rows)
    return trie.spread(code, log_mass, 0.0), trie.spread(code, valid, False), trie.spread(code, child, -1)


def slot_log_prior(
    trie: DeviceTrie, prior: RequestPrior, branch: int | Tensor, level: int, child: Tensor, request_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Log mass of the children ``child`` [R, F] of nodes of a level in 0..L-1, as `DeviceTrie.child_slots` has them.

    ``request_rows`` [R] are the requests, ``branch`` NEXT_DISLIKE or NEXT_LIKE, one for all or int64 [R]. Returns
    (log_mass [R, F] in the masses' dtype, valid bool [R, F]): valid if the child exists and has an unseen leaf;
    log_mass = log(max(mass - seen mass, 0) + eps * unseen leaves), and 0 where not valid. No synchronisation with the
    host.
    """
    entry, seen_count = prior.seen.find(level + 1, request_rows, child, trie.node_counts[level + 1])
    exists = child >= 0
    child = child.clamp(min=0)
    unseen = trie.leaf_count[level][child] - seen_count
    branches = branch if isinstance(branch, int) else branch[:, None]
    mass = prior.prior.mass(level + 1, branches, prior.day_row[request_rows][:, None], child)
    mass = (mass - prior.seen_mass[level][branches, entry]).clamp(min=0) + prior.prior.eps * unseen.to(mass.dtype)
    valid = exists & (unseen > 0)
    return mass.masked_fill(~valid, 1).log(), valid
