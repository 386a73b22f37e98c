"""Compact rows from the trie, prior and seen nodes of negfast.sid mean what negfast.sid's dense form means."""

from typing import Any

import numpy as np
import pytest
import torch

from negfast.kernels.trie_rows_reference import dense_policy
from negfast.model.choice import TrieChooser
from negfast.model.compact import compact_rows, compact_tables
from negfast.sid.prior import DevicePrior, child_log_prior
from negfast.sid.trie import SeenNodes, build_trie
from tests.sid.reference import random_codes, random_log, seen_nodes_reference


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("branch", [0, 1, None])
def test_rows_from_levels_are_the_dense_prior(levels: int, branch: int | None, seed: int):
    random = np.random.default_rng(seed)
    codebook, items, requests, days = 9, 8 if levels == 1 else 60, 5, 4
    trie = build_trie(random_codes(random, items, levels, codebook), codebook)
    prior = DevicePrior.build(trie, random_log(random, items, 3 * items, 100, days), 2.0, 0.02, "cpu")
    seen_items = [random.choice(items, random.integers(0, items), replace=False).tolist() for _ in range(requests)]
    seen = SeenNodes.from_packed(seen_nodes_reference(trie, seen_items), trie, "cpu")
    request_prior = prior.for_requests(100 + random.integers(0, days, requests), seen)
    device_trie = trie.to("cpu")

    chooser = TrieChooser(device_trie, 0.7)
    tables = compact_tables(chooser, request_prior)
    nodes = [torch.from_numpy(random.integers(0, trie.node_counts[level], 12)) for level in range(levels)]
    owners = [torch.from_numpy(random.integers(0, requests, 12)) for _ in range(levels)]
    both = branch is None
    branches: list[Any] = [torch.from_numpy(random.integers(0, 2, 12)) if both else branch] * levels
    rows = compact_rows(chooser, tables, request_prior, branches[0], nodes, owners)
    valid, log_prior = dense_policy(tables, rows)
    expected = [
        child_log_prior(device_trie, request_prior, branches[level], level, nodes[level], owners[level])[:2]
        for level in range(levels)
    ]
    assert torch.equal(valid, torch.cat([mask for _, mask in expected]))
    torch.testing.assert_close(log_prior, 0.7 * torch.cat([mass for mass, _ in expected]), rtol=1e-4, atol=1e-4)
    narrow = (rows.seen_end - rows.seen_begin).max()
    assert narrow <= codebook, "ranges hold nothing but the node's own children"
