"""The trie of semantic IDs: which codes may follow a prefix, on the host and as device tensors.

Level 0 is the root, level L the leaves; nodes of a level are numbered in lexicographic order of their codes, so
the children of a node are a range of the next level, and so are the leaves under it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negfast import staging
from negfast.errors import InputError


@dataclass(frozen=True)
class Trie:
    """I leaves under L levels of K codes; n_l is the number of nodes at level l (n_0 = 1, n_L = I)."""

    levels: int
    codebook: int
    codes: np.ndarray  # uint16 [I, L], of item i
    item_nodes: np.ndarray  # int32 [I, L], node of item i at level 1..L; the last column is its leaf
    leaf_item: np.ndarray  # int32 [I], the item of a leaf
    first_child: list[np.ndarray]  # [l] int32 [n_l + 1], l = 0..L-1: children of n are first[n]:first[n + 1]
    node_code: list[np.ndarray]  # [l - 1] uint16 [n_l], l = 1..L: last code of the node's prefix
    leaf_count: list[np.ndarray]  # [l - 1] int32 [n_l], l = 1..L: leaves under the node

    @property
    def node_counts(self) -> list[int]:
        """n_0 .. n_L."""
        return [len(first) - 1 for first in self.first_child] + [len(self.leaf_item)]

    @cached_property
    def child_bits(self) -> list[np.ndarray]:
        """[l] int32 [n_l, ceil(K/32)], l = 0..L-1: bit c of a node says that code c exists below it.

        The child is ``first_child[n]`` + the number of set bits below c. Made when first asked for, since at
        large K and many nodes this is the largest table of the trie.
        """
        words = -(-self.codebook // 32)
        tables = []
        for first, code in zip(self.first_child, self.node_code, strict=True):
            parent = np.repeat(np.arange(len(first) - 1), np.diff(first))
            bits = np.zeros((len(first) - 1) * words, dtype=np.uint32)
            word = parent * words + code // 32
            np.bitwise_or.at(bits, word, np.uint32(1) << (code % 32).astype(np.uint32))
            tables.append(bits.view(np.int32).reshape(-1, words))
        return tables

    def to(self, device: torch.device | str) -> "DeviceTrie":
        return DeviceTrie(
            levels=self.levels,
            codebook=self.codebook,
            node_counts=self.node_counts,
            fan_out=[int(np.diff(first).max()) for first in self.first_child],
            item_nodes=torch.as_tensor(self.item_nodes, device=device),
            leaf_item=torch.as_tensor(self.leaf_item, device=device),
            first_child=[torch.as_tensor(first, device=device) for first in self.first_child],
            node_code=[torch.as_tensor(code.astype(np.int32), device=device) for code in self.node_code],
            leaf_count=[torch.as_tensor(count, device=device) for count in self.leaf_count],
        )


def build_trie(codes: np.ndarray, codebook: int) -> Trie:
    """The trie of codes [I, L] (any integer type) in 0..K-1.

    Raises InputError if the table is empty, a code is out of range, or two items share all their codes.
    """
    n_items, levels = codes.shape
    if n_items == 0 or levels == 0:
        raise InputError(f"semantic IDs: expected at least one item and one level, found {n_items} x {levels}")
    if codes.min() < 0 or codes.max() >= codebook:
        raise InputError(f"semantic IDs: expected codes in 0..{codebook - 1}, found {codes.min()}..{codes.max()}")
    codes = np.ascontiguousarray(codes, dtype=np.uint16)
    order = np.lexsort(codes.T[::-1])  # radix sorts of 16-bit keys: linear in I
    ordered = codes[order]
    differs = ordered[1:] != ordered[:-1]  # [I - 1, L]
    starts_node = np.ones((n_items, levels), dtype=bool)  # leaf i is the first of its node at level l
    np.logical_or.accumulate(differs, axis=1, out=starts_node[1:])
    if not starts_node[:, -1].all():
        row = int(np.argmin(starts_node[:, -1]))
        pair = sorted((int(order[row - 1]), int(order[row])))
        raise InputError(f"semantic IDs: items {pair[0]} and {pair[1]} share the codes {ordered[row].tolist()}")

    leaf_nodes = np.cumsum(starts_node, axis=0, dtype=np.int32) - np.int32(1)  # [I, L], node above each leaf
    item_nodes = np.empty_like(leaf_nodes)
    item_nodes[order] = leaf_nodes
    starts = [np.zeros(1, dtype=np.int64)] + [np.flatnonzero(column) for column in starts_node.T]
    first_child = [
        np.append(leaf_nodes[starts[level], level], len(starts[level + 1])).astype(np.int32) for level in range(levels)
    ]
    return Trie(
        levels=levels,
        codebook=codebook,
        codes=codes,
        item_nodes=item_nodes,
        leaf_item=order.astype(np.int32),
        first_child=first_child,
        node_code=[ordered[starts[level], level - 1] for level in range(1, levels + 1)],
        leaf_count=[np.diff(starts[level], append=n_items).astype(np.int32) for level in range(1, levels + 1)],
    )


@dataclass(frozen=True)
class DeviceTrie:
    """The trie as tensors of one device; int32 ids, node codes widened to int32. Lists as in ``Trie``."""

    levels: int
    codebook: int
    node_counts: list[int]  # n_0 .. n_L
    fan_out: list[int]  # [l], l = 0..L-1: the most children that a node of level l has
    item_nodes: Tensor
    leaf_item: Tensor
    first_child: list[Tensor]
    node_code: list[Tensor]
    leaf_count: list[Tensor]

    def child_bits(self, level: int) -> Tensor:
        """Of level 0..L-1, as ``Trie.child_bits``: int32 [n_l, ceil(K/32)], bit c says that code c exists."""
        words = -(-self.codebook // 32)
        children = self.first_child[level].long().diff()
        code = self.node_code[level].long()
        nodes = torch.arange(len(children), device=children.device)
        parent = torch.repeat_interleave(nodes, children, output_size=len(code))
        bits = torch.zeros(len(children) * words, dtype=torch.int64, device=code.device)
        # codes of a node are distinct: adding sets bits
        bits.index_add_(0, parent * words + code // 32, torch.ones_like(code) << code % 32)
        return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).int().view(-1, words)

    def child_slots(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Children of nodes [R] of a level in 0..L-1, left-packed into F = ``fan_out[level]`` slots.

        Returns (child, code), int64 [R, F]: ids at level + 1 and their codes; in an empty slot the child is -1
        and the code K. Deep levels have F far below K, so work a child costs is done here and then spread.
        """
        first = self.first_child[level]
        nodes = nodes.long()
        begin, end = first[nodes].long(), first[nodes + 1]
        child = begin[:, None] + torch.arange(self.fan_out[level], device=first.device)
        none = child >= end[:, None]
        child.masked_fill_(none, -1)
        code = self.node_code[level][child.clamp(min=0)].long().masked_fill_(none, self.codebook)
        return child, code

    def spread(self, code: Tensor, values: Tensor, fill: float | int | bool) -> Tensor:
        """Values of slots [R, F] to the columns of their codes, [R, K]; ``fill`` where no code exists."""
        out = torch.full((len(code), self.codebook + 1), fill, dtype=values.dtype, device=values.device)
        return out.scatter_(1, code, values)[:, : self.codebook]  # empty slots fell into column K

    def children(self, level: int, nodes: Tensor) -> Tensor:
        """Children of nodes [R] of a level in 0..L-1: ids at level + 1, int64 [R, K]; -1 where none exists."""
        child, code = self.child_slots(level, nodes)
        return self.spread(code, child, -1)


@dataclass(frozen=True)
class SeenNodes:
    """The nodes above the seen items of a batch's requests, with the number of seen leaves under each.

    Level l holds M_l (request, node) pairs with ``key`` = request * n_l + node in ascending order, and one closing
    entry (the largest int64, count 0), so that a search always lands on an entry.
    """

    key: list[Tensor]  # [l - 1] int64 [M_l + 1]
    count: list[Tensor]  # [l - 1] int32 [M_l + 1]
    slot: list[Tensor]  # [l - 1] int64 [S]: entry of level l that holds a seen item
    leaf: Tensor  # int64 [S], leaves of the seen items
    request: Tensor  # int64 [S], their request rows

    @classmethod
    def from_packed(cls, packed: Any, trie: Trie, device: torch.device | str) -> "SeenNodes":
        """From the packer's ``seen_item`` [S], ``seen_cu`` [B+1] and, per level, ``seen_node``,
        ``seen_request``, ``seen_count`` [M_l] and ``seen_slot`` [S]."""
        key, count, slot = [], [], []
        levels = zip(packed.seen_node, packed.seen_request, packed.seen_count, packed.seen_slot, strict=True)
        for n_nodes, (node, request, seen, seen_slot) in zip(trie.node_counts[1:], levels, strict=True):
            keys = request.astype(np.int64) * n_nodes + node
            key.append(np.append(keys, np.iinfo(np.int64).max))
            count.append(np.append(seen, 0).astype(np.int32))
            slot.append(seen_slot.astype(np.int64))
        n_seen = np.diff(packed.seen_cu)
        request_of_item = np.repeat(np.arange(len(n_seen), dtype=np.int64), n_seen)
        leaf = trie.item_nodes[packed.seen_item, -1].astype(np.int64)

        def put(arrays: list[np.ndarray]) -> list[Tensor]:
            """By one copy."""
            return list(staging.put(np.concatenate(arrays), device).split([len(array) for array in arrays]))

        return cls(put(key), put(count), put(slot), *put([leaf, request_of_item]))

    def find(self, level: int, request_rows: Tensor, nodes: Tensor, n_nodes: int) -> tuple[Tensor, Tensor]:
        """Entry of (request_rows [R], nodes [R, F]) at a level in 1..L, and the seen leaves there.

        Returns (entry int64 [R, F], count int32 [R, F]); a pair without seen leaves gets the closing entry and 0.
        """
        keys = self.key[level - 1]
        wanted = request_rows[:, None].long() * n_nodes + nodes
        entry = torch.searchsorted(keys, wanted)
        entry = torch.where(keys[entry] == wanted, entry, len(keys) - 1)
        return entry, self.count[level - 1][entry]
