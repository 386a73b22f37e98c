"""Lists: the items that users will most probably dislike, by beam search on the trie."""

import numpy as np
import torch

from negfast.data.split import Requests
from negfast.errors import InputError
from negfast.memory import available_memory
from negfast.model.beam import beam_search
from negfast.runtime.engine import Engine
from negfast.sid.prior import NEXT_DISLIKE
from negfast.sid.trie import SeenNodes, Trie
from negfast.staging import put

BYTES_A_CHOICE = 64  # of one code of one beam: logits, masses, masks and the places of a top-k, all in flight at once
SEARCH_MEMORY = 2 << 30  # bytes that a batch's choices may take
EXCLUDED_AT_ONCE = 1 << 22  # excluded items times requests of a batch
REQUESTS_AT_ONCE = 64


@torch.inference_mode()
def generate(
    engine: Engine, requests: Requests, top: int, with_policy: bool = True, excluded: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ``top`` items that each request's user will most probably dislike: int32 [R, top] and log p float32 [R, top].

    -1 and -inf pad rows with fewer unseen items. Without the policy the community prior alone answers. Items of
    ``excluded`` (indices, distinct) are left out as if everybody had seen them. Batches are cut to the memory that wide
    searches take; InputError where a single request does not fit.
    """
    width = max(engine.config.eval.beam, top)
    size = batch_size(engine, width, 0 if excluded is None else len(excluded))
    items = np.full((len(requests), top), -1, dtype=np.int32)
    scores = np.full((len(requests), top), -np.inf, dtype=np.float32)
    order = np.lexsort((requests.day, requests.user))  # those of a user share histories
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        histories = engine.histories.build(requests.user[rows], requests.moment[rows])
        prior = histories.prior
        if excluded is not None and len(excluded):
            assert prior is not None
            seen = with_seen(prior.seen, engine.trie, excluded, len(rows))
            prior = engine.histories.prior.for_requests(requests.day[rows], seen)
        found, log_p = beam_search(
            engine.policy if with_policy else None,
            engine.chooser,
            histories,
            prior,
            NEXT_DISLIKE,
            width,
            top,
        )
        items[rows], scores[rows] = found.cpu().numpy(), log_p.cpu().numpy()
    return items, scores


def batch_size(engine: Engine, width: int, excluded: int) -> int:
    """Requests to search at once with ``width`` beams: `REQUESTS_AT_ONCE`, or fewer where they would not fit."""
    widest = min(width, max(engine.trie.node_counts[:-1]) * engine.trie.codebook)
    each = widest * engine.trie.codebook * BYTES_A_CHOICE
    free = available_memory()
    if each > max(free, SEARCH_MEMORY):
        raise InputError(f"a list of {width:,} items takes {each / 2**30:.0f} GiB, found {free / 2**30:.0f}: ask fewer")
    size = min(REQUESTS_AT_ONCE, SEARCH_MEMORY // each)
    return max(1, min(size, EXCLUDED_AT_ONCE // excluded) if excluded else size)


def with_seen(seen: SeenNodes, trie: Trie, items: np.ndarray, requests: int) -> SeenNodes:
    """The same as if each of the ``requests`` had seen ``items`` too."""
    device = seen.leaf.device
    leaves = np.concatenate([seen.leaf.cpu().numpy(), np.tile(trie.item_nodes[items, -1].astype(np.int64), requests)])
    rows = np.concatenate([seen.request.cpu().numpy(), np.repeat(np.arange(requests), len(items))])
    pairs = np.unique(rows * trie.node_counts[-1] + leaves)
    row, leaf = np.divmod(pairs, trie.node_counts[-1])
    key, count, slot = [], [], []
    for level, n_nodes in enumerate(trie.node_counts[1:]):
        keys, slots, counts = np.unique(
            row * n_nodes + trie.item_nodes[trie.leaf_item[leaf], level], return_inverse=True, return_counts=True
        )
        key.append(put(np.append(keys, np.iinfo(np.int64).max), device))
        count.append(put(np.append(counts, 0).astype(np.int32), device))
        slot.append(put(slots, device))
    return SeenNodes(key, count, slot, put(leaf, device), put(row, device))
