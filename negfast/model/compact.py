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
    """Trie and masses (of both branches: row branch * D + day), made once for a chooser and prior."""
    masses = None if prior is None else prior.prior
    if (kept := chooser.compact.get(masses is None)) is not None and kept[0] is masses:
        return kept[1]
    trie = chooser.trie
    tables = TrieTables.from_levels(
        first_child=trie.first_child,
        child_bits=[trie.child_bits(level) for level in range(trie.levels)],
        leaf_count=trie.leaf_count,
        codebook=trie.codebook,
        mass=None if masses is None else [mass.flatten(0, 1) for mass in masses.mass],
        weight=chooser.prior_weight,
        epsilon=1.0 if masses is None else masses.eps,
    )
    chooser.compact[masses is None] = masses, tables
    return tables


def compact_rows(
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
    days = prior.prior.mass[0].shape[1]
    # a request under the second branch is one of its own, numbered after all under the first
    branches = [branch] if isinstance(branch, int) else [NEXT_DISLIKE, NEXT_LIKE]
    count = len(prior.day_row)
    if isinstance(branch, Tensor):
        requests = [request + count * branch for request in requests]
    keys, counts, masses = [], [], []
    for level, (key, seen) in enumerate(zip(prior.seen.key, prior.seen.count, strict=True)):
        nodes_here, real = prior.prior.mass[level].shape[2], slice(0, len(key) - 1)  # without the closing entry
        keys.append(torch.cat([key[real] + number * count * nodes_here for number in range(len(branches))]))
        counts.append(seen[real].repeat(len(branches)))
        masses.append(torch.cat([prior.seen_mass[level][b, real] for b in branches]))
    mass_row = torch.cat([prior.day_row + b * days for b in branches])
    return TrieRows.from_levels(tables, list(nodes), list(requests), keys, counts, masses, mass_row)


def _unpruned_rows(tables: TrieTables, nodes: Sequence[Tensor]) -> TrieRows:
    node = torch.cat([here + base for here, base in zip(nodes, tables.level_base, strict=False)]).int()
    none = torch.zeros_like(node)
    return TrieRows(node, none, none, node[:0], node[:0].float())
