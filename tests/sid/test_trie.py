import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.errors import InputError
from negfast.sid.assign import digits
from negfast.sid.trie import SeenNodes, build_trie

from .reference import prefixes, random_codes, seen_nodes_reference

SHAPES = [(1, 1, 1), (5, 1, 9), (40, 2, 7), (200, 3, 33), (301, 4, 64), (64, 3, 4)]


@pytest.mark.parametrize(("n_items", "levels", "codebook"), SHAPES)
def test_nodes_are_the_sorted_prefixes(n_items, levels, codebook):
    codes = random_codes(np.random.default_rng(), n_items, levels, codebook)
    trie = build_trie(codes, codebook)
    nodes = [prefixes(codes, level) for level in range(levels + 1)]
    assert trie.node_counts == [len(level) for level in nodes]
    for item, row in enumerate(codes.tolist()):
        for level in range(1, levels + 1):
            assert nodes[level][trie.item_nodes[item, level - 1]] == tuple(row[:level])
        assert trie.leaf_item[trie.item_nodes[item, -1]] == item
    for level in range(1, levels + 1):
        assert trie.node_code[level - 1].tolist() == [prefix[-1] for prefix in nodes[level]]
        for node, prefix in enumerate(nodes[level]):
            under = sum(tuple(row[:level]) == prefix for row in codes.tolist())
            assert trie.leaf_count[level - 1][node] == under


@pytest.mark.parametrize(("n_items", "levels", "codebook"), SHAPES)
def test_children_on_the_device_and_their_bits(n_items, levels, codebook):
    codes = random_codes(np.random.default_rng(), n_items, levels, codebook)
    trie = build_trie(codes, codebook)
    device = trie.to("cpu")
    for level in range(levels):
        below = {prefix: i for i, prefix in enumerate(prefixes(codes, level + 1))}
        expected = [[below.get((*p, c), -1) for c in range(codebook)] for p in prefixes(codes, level)]
        rows = torch.randint(len(expected), (23,))
        children = device.children(level, rows)
        assert children.dtype == torch.int64
        assert children.tolist() == [expected[row] for row in rows.tolist()]
        bits = trie.child_bits[level].view(np.uint32)
        for node, row in enumerate(expected):
            exists = [bool(bits[node, c // 32] >> (c % 32) & 1) for c in range(codebook)]
            assert exists == [child >= 0 for child in row]
            assert sum(int(word).bit_count() for word in bits[node]) == sum(exists)  # no stray bits


def test_duplicate_and_out_of_range_codes_are_named():
    codes = np.array([[1, 2], [0, 0], [1, 2]])
    with pytest.raises(InputError, match=r"items 0 and 2 share the codes \[1, 2\]"):
        build_trie(codes, 4)
    with pytest.raises(InputError, match=r"expected codes in 0\.\.1, found 0\.\.2"):
        build_trie(codes, 2)
    with pytest.raises(InputError, match="at least one item"):
        build_trie(np.zeros((0, 2), dtype=np.uint16), 2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.integers(1, 4), requests=st.integers(1, 6))
def test_seen_nodes_find_counts(seed, levels, requests):
    rng = np.random.default_rng(seed)
    codebook = int(rng.integers(2, 9))
    n_items = int(rng.integers(1, min(codebook**levels, 60) + 1))
    trie = build_trie(random_codes(rng, n_items, levels, codebook), codebook)
    seen = [rng.choice(n_items, rng.integers(0, n_items + 1), replace=False).tolist() for _ in range(requests)]
    found = SeenNodes.from_packed(seen_nodes_reference(trie, seen), trie, "cpu")
    for level, n_nodes in enumerate(trie.node_counts[1:], start=1):
        rows = torch.from_numpy(rng.integers(0, requests, 7))
        nodes = torch.from_numpy(rng.integers(0, n_nodes, (7, 5)))
        entry, count = found.find(level, rows, nodes, n_nodes)
        assert entry.dtype == torch.int64
        for r, row in enumerate(rows.tolist()):
            for f, node in enumerate(nodes[r].tolist()):
                under = sum(trie.item_nodes[i, level - 1] == node for i in seen[row])
                assert count[r, f] == under
                assert (entry[r, f] == len(found.key[level - 1]) - 1) == (under == 0)
        slot_keys = (
            found.request * n_nodes
            + torch.as_tensor(trie.item_nodes[:, level - 1].astype(np.int64))[
                torch.as_tensor(trie.leaf_item).long()[found.leaf]
            ]
        )
        assert torch.equal(found.key[level - 1][found.slot[level - 1]], slot_keys)


def test_request_keys_exceed_int32():
    trie = build_trie(np.arange(50_000)[:, None], 50_000)
    seen: list[list[int]] = [[] for _ in range(49_999)] + [[49_999]]
    found = SeenNodes.from_packed(seen_nodes_reference(trie, seen), trie, "cpu")
    assert found.key[0][0] == 50_000 * 49_999 + 49_999 > 2**31
    _, count = found.find(1, torch.tensor([49_999, 49_998]), torch.tensor([[49_999], [49_999]]), 50_000)
    assert count.tolist() == [[1], [0]]


@pytest.mark.parametrize(("levels", "codebook"), [(3, 256), (4, 64)])
def test_a_million_leaves_are_reached_by_their_codes(levels, codebook):
    rng = np.random.default_rng(0)
    codes = digits(rng.choice(codebook**levels, 1_000_000, replace=False), levels, codebook)
    trie = build_trie(codes, codebook)
    assert trie.node_counts[-1] == 1_000_000
    assert (trie.leaf_item[trie.item_nodes[:, -1]] == np.arange(1_000_000)).all()
    assert all(count.sum() == 1_000_000 for count in trie.leaf_count)
    items = rng.permutation(1_000_000)[:200]
    nodes, device_trie = torch.zeros(200, dtype=torch.int64), trie.to("cpu")
    for level in range(levels):
        children = device_trie.children(level, nodes)
        nodes = children[torch.arange(200), torch.from_numpy(codes[items, level].astype(np.int64))]
        assert (nodes.numpy() == trie.item_nodes[items, level]).all()
