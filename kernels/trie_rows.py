"""The policy's choice at visited trie nodes, held compactly: which codes are valid at a row, and their prior.

A row is one visited node of one request's trie. Its dense form, a mask and a log prior [R, K], costs 5 bytes a code;
here a row is its node's id, and kernels rebuild the rest on chip from tables shared by all rows: one bit a code, and
4 to 8 bytes a child. Nodes of all levels are numbered in one sequence, level by level (root 0), so that the rows of
all levels fit one launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class TrieTables:
    """The trie and its node masses; N nodes, of which the first N_inner have children.

    first_child  int32 [N_inner + 1]   children of node n are first_child[n] : first_child[n + 1]
    child_bits   int32 [N_inner, ceil(K / 32)]   bit c: code c exists; its child is first_child + number of bits below
    leaf_count   int32 [N]             leaves under a node, 1 for a leaf
    level_base   global id of the first node of each level
    mass         float32 [D, N] or None   prior mass of nodes, a row per day (and branch); None: no prior
    weight, epsilon   log prior = weight * log(max(mass - seen mass, 0) + epsilon * unseen leaves)
    """

    first_child: Tensor
    child_bits: Tensor
    leaf_count: Tensor
    level_base: tuple[int, ...]
    codebook: int
    mass: Tensor | None = None
    weight: float = 1.0
    epsilon: float = 1e-2

    @classmethod
    def from_levels(
        cls,
        first_child: list[Tensor],
        child_bits: list[Tensor],
        leaf_count: list[Tensor],
        codebook: int,
        mass: list[Tensor] | None = None,
        weight: float = 1.0,
        epsilon: float = 1e-2,
    ) -> "TrieTables":
        """From per-level tables: first_child [l] int32 [n_l + 1] and child_bits [l] for levels 0..L-1, leaf_count [l]
        and mass [l] float32 [D, n_l] for levels 1..L; ids of each level from 0."""
        counts = [len(first) - 1 for first in first_child] + [len(leaf_count[-1])]
        base = [0]
        for count in counts[:-1]:
            base.append(base[-1] + count)
        first = [table[:-1] + base[level + 1] for level, table in enumerate(first_child)]
        end = first[0].new_tensor([base[-1] + counts[-1]])
        if weight != 0 and mass is not None and epsilon <= 0:
            raise ValueError(f"epsilon: found {epsilon}, expected > 0, since unseen leaves without mass need a prior")
        return cls(
            first_child=torch.cat([*first, end]).int(),
            child_bits=torch.cat(child_bits).contiguous(),
            leaf_count=torch.cat([leaf_count[0].sum(0, keepdim=True).int(), *leaf_count]).int(),
            level_base=tuple(base),
            codebook=codebook,
            mass=None if mass is None else torch.cat([mass[0].sum(1, keepdim=True), *mass], dim=1).contiguous(),
            weight=weight,
            epsilon=epsilon,
        )


@dataclass(frozen=True)
class TrieRows:
    """R rows of logits.

    node        int32 [R]   global node id; -1 for a padding row, which has no valid code
    mass_row    int32 [R] or None   row of ``TrieTables.mass``
    seen_begin, seen_end   int32 [R]   entries of the lists below that may lie among the node's children: all of the
                request's at the child level, or fewer
    seen_node   int32 [M]   global ids of nodes above the request's seen leaves, ascending within each row's range
    seen_count  int32 [M]   seen leaves under it; a child with no unseen leaf is not valid
    seen_mass   float32 [M] or None   mass of those leaves, taken off the child's
    """

    node: Tensor
    seen_begin: Tensor
    seen_end: Tensor
    seen_node: Tensor
    seen_count: Tensor
    mass_row: Tensor | None = None
    seen_mass: Tensor | None = None


@dataclass(frozen=True)
class RowTokens:
    """Which of T tokens were sampled at which row: row r serves token[start[r] : start[r + 1]]; all int32.

    start [R + 1], token [T] a permutation of 0..T-1 with a row's counted tokens first, row [T] the row of each token.
    """

    start: Tensor
    token: Tensor
    row: Tensor

    @classmethod
    def from_rows(cls, row: Tensor, counted: Tensor, rows: int) -> "RowTokens":
        """From the row of each token, any integer type in [0, rows), and whether it counts; both of T elements."""
        flat = row.reshape(-1)
        key, token = (2 * flat.long() + ~counted.reshape(-1)).sort(stable=True)
        start = torch.searchsorted(key, 2 * torch.arange(rows + 1, device=flat.device))
        return cls(start.int(), token.int(), flat.int())


def dense_policy(
    tables: TrieTables, rows: TrieRows, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """The dense form of rows: valid bool [R, K] and log prior [R, K] (0 where not valid; None without a prior).

    The eager reference of what kernels rebuild on chip; logarithms are taken in ``dtype``.
    """
    device = rows.node.device
    codes = torch.arange(tables.codebook, device=device)
    inside = rows.node >= 0
    node = rows.node.clamp(min=0).long()
    words = tables.child_bits[node]
    exists = ((words[:, codes // 32] >> (codes % 32)) & 1).bool() & inside[:, None]
    rank = exists.long().cumsum(-1) - exists.long()
    child = torch.where(exists, tables.first_child[node].long()[:, None] + rank, 0)

    # what is seen, scattered to the rank of the child it belongs to, then read at each code's rank
    sizes = (rows.seen_end - rows.seen_begin).long()
    pair_row = torch.repeat_interleave(torch.arange(len(node), device=device), sizes)
    first_pair = sizes.cumsum(0) - sizes
    entry = torch.arange(len(pair_row), device=device) - first_pair[pair_row] + rows.seen_begin[pair_row].long()
    seen_rank = rows.seen_node[entry].long() - tables.first_child[node[pair_row]].long()
    children = exists.sum(-1)
    among = (seen_rank >= 0) & (seen_rank < children[pair_row])
    place, entry = (pair_row * tables.codebook + seen_rank)[among], entry[among]

    def at_codes(values: Tensor) -> Tensor:
        by_rank = torch.zeros(exists.numel(), dtype=values.dtype, device=device).index_add(0, place, values[entry])
        return by_rank.view_as(exists).gather(1, rank.clamp(max=tables.codebook - 1))

    unseen = tables.leaf_count[child] - at_codes(rows.seen_count)
    valid = exists & (unseen > 0)
    if tables.mass is None or tables.weight == 0:
        return valid, None
    if rows.mass_row is None or rows.seen_mass is None:
        raise ValueError("mass_row and seen_mass: found None, expected tensors since the tables hold a prior")
    mass = tables.mass[rows.mass_row.long()[:, None], child].to(dtype)
    mass = (mass - at_codes(rows.seen_mass.to(dtype))).clamp(min=0)
    log_prior = tables.weight * torch.log(mass + tables.epsilon * unseen)
    return valid, torch.where(valid, log_prior, 0.0)


@triton.jit
def load_prior(
    row,
    first_child,
    child_bits,
    leaf_count,
    mass,
    node,
    mass_row,
    seen_begin,
    seen_end,
    seen_node,
    seen_count,
    seen_mass,
    words,
    nodes,
    weight,
    epsilon,
    BLOCK_K: tl.constexpr,
):
    """Valid codes and log2 of the prior of one row, each [BLOCK_K]; pointers as in TrieTables and TrieRows.

    Works on octets of codes, the codes of one thread: a word of bits is read once for eight of them, and a child's
    rank is a sum within the thread plus one prefix sum over octets.
    """
    here = tl.load(node + row)
    octet = tl.arange(0, BLOCK_K // 8)
    inside = octet // 4 < tl.where(here >= 0, words, 0)
    here = tl.maximum(here, 0).to(tl.int64)
    word = tl.load(child_bits + here * words + octet // 4, mask=inside, other=0)
    bits = (word >> (octet % 4 * 8))[:, None] >> tl.arange(0, 8)[None, :] & 1
    inner = tl.cumsum(bits, 1)
    children = tl.sum(bits, 1)
    before = tl.cumsum(children, 0) - children
    exists = bits != 0
    child = tl.load(first_child + here) + before[:, None] + (inner - bits)
    unseen = tl.load(leaf_count + child, mask=exists, other=0)
    left = tl.zeros([BLOCK_K // 8, 8], tl.float32)
    if mass is not None:
        day = tl.load(mass_row + row).to(tl.int64)
        left = tl.load(mass + day * nodes + child, mask=exists, other=0.0)
    begin = tl.load(seen_begin + row)
    end = tl.load(seen_end + row)
    if begin < end:
        entry, found = find_seen(seen_node, begin, end, child, exists)
        unseen -= tl.load(seen_count + entry, mask=found, other=0)
        if mass is not None:
            left = tl.maximum(left - tl.load(seen_mass + entry, mask=found, other=0.0), 0.0)
    prior = tl.zeros([BLOCK_K // 8, 8], tl.float32)
    valid = unseen > 0
    if mass is not None:
        prior = weight * tl.log2(tl.where(valid, left + epsilon * unseen.to(tl.float32), 1.0))
    return tl.reshape(valid, [BLOCK_K]), tl.reshape(prior, [BLOCK_K])


@triton.jit
def find_seen(seen_node, begin, end, child, exists):
    """Binary search of each child among seen_node[begin:end], ascending; (entry, found)."""
    low = tl.zeros_like(child) + begin
    high = tl.zeros_like(child) + end
    span = end - begin
    while span > 0:
        middle = (low + high) // 2
        searching = exists & (low < high)
        smaller = tl.load(seen_node + middle, mask=searching, other=0) < child
        low = tl.where(searching & smaller, middle + 1, low)
        high = tl.where(searching & (smaller == 0), middle, high)
        span = span // 2
    inside = exists & (low < end)
    found = inside & (tl.load(seen_node + low, mask=inside, other=-1) == child)
    return low, found


@triton.jit
def log2_softmax_row(scores, valid):
    """(log2 p, p) of one row of scores in units of log2, over its valid codes: -1e30 and 0 where not valid.

    A finite number instead of -inf, so that 0 * log 0 needs no care. A row without a valid code is uniform; no token
    that counts is sampled there.
    """
    scores = tl.where(valid, scores, -1e30)
    top = tl.max(scores, 0)
    p = tl.exp2(scores - top)
    total = tl.sum(p, 0)
    return scores - (top + tl.log2(total)), p * (1 / total)


def row_block(codebook: int) -> dict[str, int]:
    """Block and warps with which a whole row of ``codebook`` codes is held on chip. Raises ValueError above 8,192."""
    if not 1 <= codebook <= 8192:
        raise ValueError(f"codebook: found {codebook}, expected 1 to 8192 codes a row")
    block = max(triton.next_power_of_2(codebook), 256)
    return {"BLOCK_K": block, "num_warps": min(block // 256, 16)}
