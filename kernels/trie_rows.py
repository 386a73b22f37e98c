"""The policy's choice at visited trie nodes, held compactly: which codes are valid at a row, and their prior.

A row is one visited node of one request's trie. Its dense form, a mask and a log prior [R, K], costs 5 bytes a code;
here a row is its node's id and 4 bytes a child, and kernels rebuild the rest on chip: of tables that all rows share, a
bit a code, and of the short list of what the request has seen. Nodes of all levels are numbered in one sequence, level
by level (root 0), so that the rows of all levels fit one launch.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from negfast.kernels.dispatch import check_tensors, runs_triton


@dataclass(frozen=True)
class TrieTables:
    """The trie; N nodes, of which the first N_inner have children.

    first_child  int32 [N_inner + 1]   children of node n are first_child[n] : first_child[n + 1]
    child_bits   int32 [N_inner, ceil(K / 32)]   bit c: code c exists; its child is first_child + number of bits below
    leaf_count   int32 [N]             leaves under a node, 1 for a leaf
    level_base   global id of the first node of each level
    weight       of the log prior: prior(child) = weight * log(max(mass - seen mass, 0) + epsilon * unseen leaves)
    """

    first_child: Tensor
    child_bits: Tensor
    leaf_count: Tensor
    level_base: tuple[int, ...]
    codebook: int
    weight: float = 1.0
    epsilon: float = 1e-2

    @classmethod
    def from_levels(
        cls,
        first_child: list[Tensor],
        child_bits: list[Tensor],
        leaf_count: list[Tensor],
        codebook: int,
        weight: float = 1.0,
        epsilon: float = 1e-2,
    ) -> "TrieTables":
        """From per-level tables: first_child [l] int32 [n_l + 1] and child_bits [l] for levels 0..L-1, leaf_count [l]
        for levels 1..L; ids of each level from 0. Made once a trie."""
        if epsilon <= 0:
            raise ValueError(f"epsilon: found {epsilon}, expected > 0, since unseen leaves without mass need a prior")
        counts = [len(first) - 1 for first in first_child] + [len(leaf_count[-1])]
        base = [0]
        for count in counts[:-1]:
            base.append(base[-1] + count)
        first = [table[:-1] + base[level + 1] for level, table in enumerate(first_child)]
        end = first[0].new_tensor([base[-1] + counts[-1]])
        leaves = torch.cat([leaf_count[0].sum(0, keepdim=True).int(), *leaf_count]).int()
        return cls(
            first_child=torch.cat([*first, end]).int(),
            child_bits=torch.cat(child_bits).contiguous(),
            leaf_count=leaves,
            level_base=tuple(base),
            codebook=codebook,
            weight=weight,
            epsilon=epsilon,
        )

    @cached_property
    def word_first(self) -> Tensor:
        """int32 of the shape of child_bits: id of the first child in each word of 32 codes."""
        x = self.child_bits.long() & 0xFFFFFFFF
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        counts = (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24) & 0xFF
        return (self.first_child[:-1, None] + counts.cumsum(-1) - counts).int()

    def seen_log_mass(self, seen_node: Tensor, seen_count: Tensor, unseen_mass: Tensor | None) -> Tensor:
        """log_mass [M] of nodes after their seen leaves are taken off; -inf where none is left unseen.

        seen_node and seen_count int32 [M]; unseen_mass float32 [M] the nodes' mass without that of those leaves, at
        least 0; None without a prior.
        """
        unseen = self.leaf_count[seen_node.long()] - seen_count
        left = torch.ones_like(unseen, dtype=torch.float32)
        if unseen_mass is not None:
            left = unseen_mass.clamp(min=0) + self.epsilon * unseen
        return torch.where(unseen > 0, left, 0.0).log()


@dataclass(frozen=True)
class TrieRows:
    """R rows of logits.

    node        int32 [R]   global node id; -1 for a padding row, which has no valid code
    seen_begin, seen_end   int32 [R]   entries of the lists below that may lie among the node's children: all of the
                request's at the child level, or, faster, only those that do
    seen_node   int32 [M]   global ids of nodes above the requests' seen leaves, ascending within each row's range
    seen_log    float32 [M] ``TrieTables.seen_log_mass`` of them: -inf prunes the node
    log_mass    float32 [P] log(mass + epsilon * leaf_count) of children, for those without seen leaves; None without a
                prior
    mass_start  int32 [R]   a child's place in ``log_mass`` is this plus its id; None without a prior
    """

    node: Tensor
    seen_begin: Tensor
    seen_end: Tensor
    seen_node: Tensor
    seen_log: Tensor
    log_mass: Tensor | None = None
    mass_start: Tensor | None = None

    @classmethod
    def from_levels(
        cls,
        tables: TrieTables,
        nodes: list[Tensor],
        requests: list[Tensor],
        seen_key: list[Tensor],
        seen_count: list[Tensor],
        unseen_mass: list[Tensor] | None = None,
        child_mass: list[Tensor] | None = None,
    ) -> "TrieRows":
        """Rows of all levels, level by level, from ids that count from 0 within each level; no synchronisation.

        nodes, requests  [l] int64 [R_l], l = 0..L-1: the visited nodes of level l (-1: padding) and their requests
        seen_key    [l - 1] int64 [M_l], l = 1..L: request * n_l + node, ascending, of nodes above seen leaves; a
                    closing entry of the largest int64 is allowed
        seen_count  [l - 1] int32 [M_l] seen leaves under it
        unseen_mass [l - 1] float32 [M_l] its mass without that of those leaves
        child_mass  [l] float32 [R_l, F_l], l = 0..L-1: mass of the children of each visited node, in their order; what
                    stands behind them is not read
        The last two are those of a prior, None without one.
        """
        base = (*tables.level_base, len(tables.leaf_count))
        rows: list[tuple[Tensor, ...]] = []
        seen: list[tuple[Tensor, Tensor]] = []
        log_mass: list[Tensor] = []
        mass_start: list[Tensor] = []
        offset = place = 0
        for level, (node, request, key) in enumerate(zip(nodes, requests, seen_key, strict=True)):
            size = base[level + 2] - base[level + 1]
            here = torch.where(node >= 0, node + base[level], -1)
            children = tables.first_child[here.clamp(min=0)[:, None] + torch.arange(2, device=node.device)].long()
            wanted = request[:, None] * size + children - base[level + 1]
            begin, end = (torch.searchsorted(key, wanted) + offset).unbind(1)
            rows.append((here, begin, end))
            entry_node = key % size + base[level + 1]  # of a closing entry, which lies in no row's range, anything
            left = None if unseen_mass is None else unseen_mass[level]
            seen.append((entry_node, tables.seen_log_mass(entry_node, seen_count[level], left)))
            offset += len(key)
            if child_mass is not None:
                mass, first = child_mass[level], children[:, :1]
                child = first + torch.arange(mass.shape[1], device=first.device)
                leaves = tables.leaf_count[child.clamp(max=len(tables.leaf_count) - 1)]
                log_mass.append((mass + tables.epsilon * leaves).log().flatten())
                mass_start.append(torch.arange(len(mass), device=first.device) * mass.shape[1] + place - first[:, 0])
                place += mass.numel()
        here, begin, end = (torch.cat(column) for column in zip(*rows, strict=True))
        return cls(
            node=here.int(),
            seen_begin=begin.int(),
            seen_end=end.int(),
            seen_node=torch.cat([node for node, _ in seen]).int(),
            seen_log=torch.cat([log for _, log in seen]),
            log_mass=torch.cat(log_mass) if log_mass else None,
            mass_start=torch.cat(mass_start).int() if mass_start else None,
        )


@dataclass(frozen=True)
class RowTokens:
    """The T = L * C tokens of C completions, level by level, and the rows at which they were sampled; int32 but one.

    start       [R + 1]  row r serves token[start[r] : start[r + 1]]
    token       [T]      a permutation of 0..T-1, the counted tokens of each row first
    completion  [T]      the completion of each entry of ``token``
    row         [T]      the row of each token, in the tokens' own order
    code        [L, C]   the sampled code of each token
    counted     bool [L, C]   False for forced tokens and padding; every token still belongs to some row
    """

    start: Tensor
    token: Tensor
    completion: Tensor
    row: Tensor
    code: Tensor
    counted: Tensor

    @classmethod
    def build(cls, row: Tensor, code: Tensor, counted: Tensor, rows: int) -> "RowTokens":
        """From the row of each token in [0, rows) and its code, any integer type [L, C], and ``counted``."""
        flat = row.reshape(-1)
        key, token = (2 * flat.long() + ~counted.reshape(-1)).sort(stable=True)
        start = torch.searchsorted(key, 2 * torch.arange(rows + 1, device=flat.device))
        completion = token % row.shape[-1]
        return cls(start.int(), token.int(), completion.int(), flat.int(), code.int(), counted)


class RowInputs(NamedTuple):
    """What kernels read of tables and rows, in the order of their arguments."""

    child_bits: Tensor
    word_first: Tensor
    log_mass: Tensor | None
    node: Tensor
    mass_start: Tensor | None
    seen_begin: Tensor
    seen_end: Tensor
    seen_node: Tensor
    seen_log: Tensor

    @property
    def words(self) -> int:
        """Words of a node's child bits."""
        return self.child_bits.shape[1]


def row_inputs(logits: Tensor, tables: TrieTables, rows: TrieRows) -> RowInputs:
    """What a kernel over ``logits`` [R, K] reads; ValueError unless all has the shape, dtype and device it reads."""
    count, codebook = logits.shape
    if runs_triton(logits.device, "trie_grpo") and logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits: found {logits.dtype}, expected float32, bfloat16 or float16")
    if (rows.log_mass is None) != (rows.mass_start is None):
        raise ValueError("log_mass and mass_start: found one of them, expected both or none")
    inputs = RowInputs(
        tables.child_bits,
        tables.word_first,
        rows.log_mass,
        rows.node,
        rows.mass_start,
        rows.seen_begin,
        rows.seen_end,
        rows.seen_node,
        rows.seen_log,
    )
    bits = (len(tables.first_child) - 1, -(-codebook // 32))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("node", "mass_start", "seen_begin", "seen_end"), (count,))
    shapes |= dict.fromkeys(("seen_node", "seen_log"), tuple(rows.seen_node.shape))
    places = 0 if rows.log_mass is None else rows.log_mass.numel()
    shapes |= {"child_bits": bits, "word_first": bits, "log_mass": (places,)}
    floats = ("log_mass", "seen_log")
    expected = {
        name: (tensor, shapes[name], torch.float32 if name in floats else torch.int32)
        for name, tensor in inputs._asdict().items()
    }
    check_tensors(expected, logits.device)
    return inputs
