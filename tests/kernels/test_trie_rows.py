"""Compact rows from the trie, prior and seen nodes of negfast.sid mean what negfast.sid's dense form means."""

import numpy as np
import pytest
import torch

from negfast.kernels.trie_rows import TrieRows, TrieTables
from negfast.kernels.trie_rows_reference import dense_policy
from negfast.sid.prior import DevicePrior, child_log_prior
from negfast.sid.trie import SeenNodes, build_trie
from tests.sid.reference import random_codes, seen_nodes_reference


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("branch", [0, 1])
def test_rows_from_levels_are_the_dense_prior(levels: int, branch: int, seed: int):
    random = np.random.default_rng(seed)
    codebook, items, requests, days = 9, 8 if levels == 1 else 60, 5, 4
    trie = build_trie(random_codes(random, items, levels, codebook), codebook)
    masses = random.exponential(1.0, (2, days, items)) * (random.random((2, days, items)) < 0.6)
    prior = DevicePrior.build(trie, masses[0], masses[1], first_day=100, eps=0.02, device="cpu")
    seen_items = [random.choice(items, random.integers(0, items), replace=False).tolist() for _ in range(requests)]
    seen = SeenNodes.from_packed(seen_nodes_reference(trie, seen_items), trie, "cpu")
    request_prior = prior.for_requests(100 + random.integers(0, days, requests), seen)
    device_trie = trie.to("cpu")

    tables = TrieTables.from_levels(
        first_child=device_trie.first_child,
        child_bits=[torch.from_numpy(bits) for bits in trie.child_bits],
        leaf_count=device_trie.leaf_count,
        codebook=codebook,
        mass=[mass.flatten(0, 1) for mass in prior.mass],  # row branch * D + day
        weight=0.7,
        epsilon=0.02,
    )
    nodes = [torch.from_numpy(random.integers(0, trie.node_counts[level], 12)) for level in range(levels)]
    owners = [torch.from_numpy(random.integers(0, requests, 12)) for _ in range(levels)]
    rows = TrieRows.from_levels(
        tables,
        nodes,
        owners,
        seen.key,
        seen.count,
        [mass[branch] for mass in request_prior.seen_mass],
        request_prior.day_row + branch * days,
    )
    valid, log_prior = dense_policy(tables, rows)
    expected = [
        child_log_prior(device_trie, request_prior, branch, level, nodes[level], owners[level])
        for level in range(levels)
    ]
    assert torch.equal(valid, torch.cat([mask for _, mask in expected]))
    torch.testing.assert_close(log_prior, 0.7 * torch.cat([mass for mass, _ in expected]), rtol=1e-4, atol=1e-4)
    narrow = (rows.seen_end - rows.seen_begin).max()
    assert narrow <= codebook, "ranges hold nothing but the node's own children"
