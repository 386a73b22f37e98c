"""Slow references of the trie and of the packer's seen nodes, in plain Python."""

from collections import Counter
from types import SimpleNamespace

import numpy as np


def random_codes(rng, n_items, levels, codebook):
    """Distinct code rows, clumped so that some nodes have many children and some one."""
    distinct: set[tuple[int, ...]] = set()
    while len(distinct) < n_items:
        width = codebook if rng.random() < 0.5 else max(1, codebook // 4)
        distinct.add(tuple(int(c) for c in rng.integers(0, width, levels)))
        if len(distinct) >= max(1, codebook // 4) ** levels:
            distinct.add(tuple(int(c) for c in rng.integers(0, codebook, levels)))
    rows = sorted(distinct)[:n_items]
    rng.shuffle(rows)
    return np.array(rows, dtype=np.uint16).reshape(n_items, levels)


def prefixes(codes, level):
    """Distinct prefixes of a level in lexicographic order: a node's id is its position here."""
    return sorted({tuple(row[:level]) for row in codes.tolist()})


def seen_nodes_reference(trie, seen_items):
    """What the packer returns of each request's seen items, made item by item."""
    seen_items = [sorted(set(items)) for items in seen_items]
    packed = SimpleNamespace(seen_node=[], seen_request=[], seen_count=[], seen_slot=[])
    packed.seen_item = np.array([i for items in seen_items for i in items], dtype=np.int32)
    packed.seen_cu = np.cumsum([0] + [len(items) for items in seen_items]).astype(np.int32)
    for column in range(trie.levels):
        pairs = [(row, int(trie.item_nodes[i, column])) for row, items in enumerate(seen_items) for i in items]
        counts = Counter(pairs)
        ordered = sorted(counts)
        packed.seen_request.append(np.array([row for row, _ in ordered], dtype=np.int32))
        packed.seen_node.append(np.array([node for _, node in ordered], dtype=np.int32))
        packed.seen_count.append(np.array([counts[pair] for pair in ordered], dtype=np.int32))
        packed.seen_slot.append(np.array([ordered.index(pair) for pair in pairs], dtype=np.int32))
    return packed
