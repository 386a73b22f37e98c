"""Slow references of the trie and of the packer's seen nodes, in plain Python."""

from collections import Counter
from types import SimpleNamespace

import numpy as np

from negfast.data.log import DAY, EventLog


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


def dense_mass(log, feedback, half_life_days, first_day, last_day):
    """Mass of every item at the end of each day in first_day..last_day, float64 [D, I], event by event."""
    mass = np.zeros((last_day - first_day + 1, log.n_items))
    for item, kind, time in zip(log.item, log.feedback, log.time, strict=True):
        age = np.arange(first_day, last_day + 1) - time // 86_400
        if kind == feedback:
            mass[:, item] += np.where(age >= 0, 2.0 ** (-np.maximum(age, 0) / half_life_days), 0.0)
    return mass


def random_log(rng, n_items, n_events, first_day, days):
    """Events of one user on random items, none on the day ``first_day`` and some on the last of ``days``."""
    day = np.sort(np.append(rng.integers(1, days, n_events - 2), [1, days - 1]))
    return EventLog(
        user_offsets=np.array([0, n_events]),
        item=rng.integers(0, n_items, n_events).astype(np.int32),
        feedback=rng.integers(0, 3, n_events).astype(np.uint8),
        time=(first_day + day) * DAY,
        value=None,
        n_items=n_items,
    )


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
