"""Choices in the form that kernels read: node ids beside tables of the whole trie, instead of masks and priors [R, K].

`TrieChooser.choose` makes the dense form of the same; `negfast.kernels.trie_rows_reference.dense_policy` ties the two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from negfast.kernels.trie_rows import TrieRows, TrieTables
from negfast.model.choice import TrieChooser
from negfast.sid.prior import NEXT_DISLIKE, NEXT_LIKE, RequestPrior


def compact_tables(chooser: TrieChooser, prior: RequestPrior | None) -> TrieTables:
    """The trie, and what the rows of a prior need beside it; made once for a chooser and prior."""
    epsilon = 1.0 if prior is None else prior.prior.eps
    if (kept := chooser.compact.get(epsilon)) is not None:
        return kept
    trie = chooser.trie
    tables = TrieTables.from_levels(
        first_child=trie.first_child,
        child_bits=[trie.child_bits(level) for level in range(trie.levels)],
        leaf_count=trie.leaf_count,
        codebook=trie.codebook,
        weight=chooser.prior_weight,
        epsilon=epsilon,
    )
    chooser.compact[epsilon] = tables
    return tables


def compact_rows(
    chooser: TrieChooser,
    tables: TrieTables,
    prior: RequestPrior | None,
    branch: int | Tensor,
    nodes: Sequence[Tensor],
    requests: Sequence[Tensor],
) -> TrieRows:
    """Rows of all levels, level by level: the choices at ``nodes`` [l] int64 [R_l] for ``requests`` [l] int64 [R_l].

    ``branch`` is one for all, or int64 of the shape of each ``requests``. Without ``prior`` nothing is pruned.
    """
    if prior is None:
        return _unpruned_rows(tables, nodes)
    # a request under the second branch is one of its own, numbered after all under the first
    branches = [branch] if isinstance(branch, int) else [NEXT_DISLIKE, NEXT_LIKE]
    count, trie = len(prior.day_row), chooser.trie
    numbered = list(requests) if isinstance(branch, int) else [request + count * branch for request in requests]
    keys, counts = [], []
    unseen_mass, child_mass = list[Tensor](), list[Tensor]()
    for level, (key, seen) in enumerate(zip(prior.seen.key, prior.seen.count, strict=True)):
        n_nodes, real = trie.node_counts[level + 1], slice(0, len(key) - 1)  # without the closing entry
        keys.append(torch.cat([key[real] + number * count * n_nodes for number in range(len(branches))]))
        counts.append(seen[real].repeat(len(branches)))
        if not chooser.prior_weight:
            continue
        day = prior.day_row[key[real] // n_nodes]
        of_branch = [prior.prior.mass(level + 1, b, day, key[real] % n_nodes) for b in branches]
        left = [mass - prior.seen_mass[level][b, real] for b, mass in zip(branches, of_branch, strict=True)]
        unseen_mass.append(torch.cat(left))
        child, _ = trie.child_slots(level, nodes[level].clamp(min=0))
        of_row = branch if isinstance(branch, int) else branch[:, None]
        row_day = prior.day_row[requests[level]][:, None]
        child_mass.append(prior.prior.mass(level + 1, of_row, row_day, child.clamp(min=0)))
    masses = (unseen_mass, child_mass) if chooser.prior_weight else (None, None)
    return TrieRows.from_levels(tables, list(nodes), numbered, keys, counts, *masses)


def _unpruned_rows(tables: TrieTables, nodes: Sequence[Tensor]) -> TrieRows:
    node = torch.cat([here + base for here, base in zip(nodes, tables.level_base, strict=False)]).int()
    none = torch.zeros_like(node)
    return TrieRows(node, none, none, node[:0], node[:0].float())
