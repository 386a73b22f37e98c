"""The packer against a reference that follows the definitions one event at a time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.data.log import DISLIKE, LIKE, WITHDRAWN, EventLog
from negfast.data.shards import PackedPrompts, open_shard, write_shard
from negfast.errors import InputError
from negfast.sid.trie import build_trie

from .shard_logs import random_log

MARKERS = (900, 901, 902)  # likes, dislikes, trending
DAY = 86_400


def reference_pack(log: EventLog, request: dict, item_nodes: np.ndarray) -> PackedPrompts:
    tokens, cu, seen_item, seen_cu = [], [0], [], [0]
    levels = item_nodes.shape[1]
    nodes: list[list[int]] = [[] for _ in range(levels)]
    rows: list[list[int]] = [[] for _ in range(levels)]
    counts: list[list[int]] = [[] for _ in range(levels)]
    slots: list[list[int]] = [[] for _ in range(levels)]
    for b, user in enumerate(request["users"]):
        events = [
            (int(log.item[i]), int(log.feedback[i]))
            for i in range(log.user_offsets[user], log.user_offsets[user + 1])
            if log.time[i] < request["cut"][b]
        ]
        last: dict[int, tuple[int, int]] = {}  # item -> (place, feedback)
        for place, (item, feedback) in enumerate(events):
            if feedback in (LIKE, DISLIKE, WITHDRAWN):
                last[item] = (place, feedback)
        timeline: list = []
        for bit, kind, marker, cap in (
            (1, LIKE, MARKERS[0], request["like_cap"]),
            (2, DISLIKE, MARKERS[1], request["dislike_cap"]),
        ):
            if request["views"][b] & bit:
                shown = sorted((p, i) for i, (p, f) in last.items() if f == kind)
                shown = shown[len(shown) - min(cap, len(shown)) :]
                timeline.append((-1, marker, []))
                timeline += [(place, marker, request["item_tokens"][item]) for place, item in shown]
        if request["timeline"]:
            timeline = timeline[:1] + sorted((event for event in timeline if event[0] >= 0), key=lambda event: event[0])
        before = None
        for place, marker, item_tokens in timeline:
            if marker != before or place < 0:
                tokens.append(marker)
            before = marker
            tokens.extend(item_tokens)
        if request["trending_row"][b] >= 0:
            tokens.append(MARKERS[2])
            for item in request["trending"][request["trending_row"][b]]:
                if item >= 0:
                    tokens.extend(request["item_tokens"][item])
        if request["tail"][b] >= 0:
            tokens.append(request["tail"][b])
        cu.append(len(tokens))
        seen = sorted({item for item, _ in events})
        seen_item.extend(seen)
        seen_cu.append(len(seen_item))
        for level in range(levels):
            for node in sorted({item_nodes[item, level] for item in seen}):
                nodes[level].append(node)
                rows[level].append(b)
                counts[level].append(sum(item_nodes[item, level] == node for item in seen))
            here = list(zip(rows[level], nodes[level], strict=True))
            slots[level].extend(here.index((b, item_nodes[item, level])) for item in seen)
    columns: list[Any] = [tokens, cu, seen_item, seen_cu, nodes, rows, counts, slots]  # lists, not arrays
    return PackedPrompts(*columns)


def random_request(rng: np.random.Generator, log: EventLog, size: int, levels: int) -> dict:
    return {
        "users": rng.integers(0, log.n_users, size).astype(np.int32),
        "cut": rng.integers(-1, 45, size),
        "views": rng.integers(0, 4, size).astype(np.uint8),
        "like_cap": int(rng.integers(0, 12)),
        "dislike_cap": int(rng.integers(0, 12)),
        "item_tokens": rng.integers(0, 800, (log.n_items, levels)).astype(np.int32),
        "trending": rng.integers(-1, log.n_items, (3, 4)).astype(np.int32),
        "trending_row": rng.integers(-1, 3, size).astype(np.int32),
        "tail": rng.choice([-1, 903, 904], size).astype(np.int32),
        "timeline": bool(rng.integers(2)),
    }


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), threads=st.integers(1, 3), size=st.integers(0, 150))
def test_pack_follows_the_definitions(tmp_path_factory, seed, threads, size):
    rng = np.random.default_rng(seed)
    levels, codebook = int(rng.integers(1, 5)), 40
    log = random_log(
        rng, users=int(rng.integers(1, 30)), items=int(rng.integers(1, 40)), longest=int(rng.integers(0, 40))
    )
    seconds = int(rng.choice([1, 9_000, DAY, 17 * DAY]))  # between one moment of the log and the next
    log = replace(log, time=log.time * seconds)
    codes = rng.permutation(codebook)[: log.n_items, None] // [8 ** (levels - 1 - k) for k in range(levels)]
    codes[:, -1] = rng.permutation(codebook)[: log.n_items]  # distinct rows under shared prefixes
    trie = build_trie(codes.astype(np.uint16), codebook)
    path = tmp_path_factory.mktemp("pack") / "events.nfs"
    write_shard(path, log)
    request = random_request(rng, log, size, levels)
    request["cut"] = request["cut"] * seconds + int(rng.integers(-1, 2))
    packed = open_shard(path).pack(**request, item_nodes=trie.item_nodes, markers=MARKERS, threads=threads)
    expected = reference_pack(log, request, trie.item_nodes)
    for name in ("tokens", "cu_seqlens", "seen_item", "seen_cu"):
        found = getattr(packed, name)
        assert found.dtype == np.int32
        assert found.tolist() == getattr(expected, name), name
    for name in ("seen_node", "seen_request", "seen_count", "seen_slot"):
        assert [a.tolist() for a in getattr(packed, name)] == getattr(expected, name), name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("users", 99, "found user 99, expected 0 to 4"),
        ("users", -1, "found user -1"),
        ("views", 4, "found view 4, expected 0 to 3"),
        ("trending_row", 3, "found trending row 3, expected -1 to 2"),
        ("trending", 50, "found item 50"),
    ],
)
def test_requests_outside_the_tables_are_refused(tmp_path, field, value, message):
    rng = np.random.default_rng(5)
    log = random_log(rng, users=5, items=7, longest=9)
    write_shard(tmp_path / "events.nfs", log)
    request = random_request(rng, log, 4, 2)
    request[field].reshape(-1)[2] = value
    nodes = build_trie(np.arange(14, dtype=np.uint16).reshape(7, 2), 20).item_nodes
    with pytest.raises(InputError, match=message):
        open_shard(tmp_path / "events.nfs").pack(**request, item_nodes=nodes, markers=MARKERS)


def test_nodes_that_do_not_follow_the_leaves_are_refused(tmp_path):
    log = EventLog(np.array([0, 2]), np.array([0, 1], np.int32), np.ones(2, np.uint8), np.array([1, 2]), None, 2)
    write_shard(tmp_path / "events.nfs", log)
    request = random_request(np.random.default_rng(0), log, 1, 2) | {"cut": np.array([9])}
    nodes = np.array([[1, 0], [0, 1]], np.int32)
    with pytest.raises(InputError, match="level 1 is not numbered in the order of the leaves"):
        open_shard(tmp_path / "events.nfs").pack(**request, item_nodes=nodes, markers=MARKERS)


@pytest.fixture
def packable(tmp_path):
    """A shard's pack with everything but the users given."""
    rng = np.random.default_rng(6)
    log = random_log(rng, users=60, items=30, longest=40)
    write_shard(tmp_path / "events.nfs", log)
    nodes = build_trie(np.arange(60, dtype=np.uint16).reshape(30, 2), 60).item_nodes
    shard, request = open_shard(tmp_path / "events.nfs"), random_request(rng, log, 60, 2)

    def pack(users: slice, **options) -> PackedPrompts:
        rows = {name: request[name][users] for name in ("users", "cut", "views", "trending_row", "tail")}
        return shard.pack(**(request | rows), item_nodes=nodes, markers=MARKERS, **options)

    return pack


def lists(packed: PackedPrompts) -> list:
    return [[a.tolist() for a in v] if isinstance(v, list) else v.tolist() for v in vars(packed).values()]
