"""The packer against a reference that follows the definitions one event at a time."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, WITHDRAWN, EventLog
from negfast.data.shards import GAPS, START, PackedHistories, Shard, open_shard, write_shard
from negfast.errors import InputError
from negfast.sid.trie import build_trie

from .shard_logs import random_log

POSITIVE_ONLY, NEGATIVE_ONLY, MIXED = 1, 2, 3  # views
SHOWN = {
    0: set(),
    POSITIVE_ONLY: {LIKE},
    NEGATIVE_ONLY: {DISLIKE},
    MIXED: {LIKE, DISLIKE, EXPOSED, WITHDRAWN},
}
PER_LEVEL = "seen_node", "seen_request", "seen_count", "seen_slot"


def reference_gap(seconds: int) -> int:
    """The smallest bucket whose bound is above: 64 s, 128 s, 256 s, ... from bucket 1 on."""
    bucket = 1
    while bucket < GAPS - 1 and seconds >= 64 * 2 ** (bucket - 1):
        bucket += 1
    return bucket


def reference_pack(log: EventLog, request: dict, item_nodes: np.ndarray) -> dict[str, list]:
    packed: dict[str, list] = {name: [] for name in PackedHistories.__dataclass_fields__}
    levels = item_nodes.shape[1]
    for name in PER_LEVEL:
        packed[name] = [[] for _ in range(levels)]
    packed["cu_seqlens"], packed["seen_cu"] = [0], [0]
    requests = 0
    for b, (user, first, view) in enumerate(zip(request["users"], request["first"], request["views"], strict=True)):
        events = [
            (int(log.item[i]), int(log.feedback[i]), int(log.time[i]))
            for i in range(log.user_offsets[user], log.user_offsets[user + 1])
        ]
        branches = np.flatnonzero(request["branch_history"] == b)
        moments = [int(request["moments"][a]) for a in branches]
        packed["item"].append(-1)
        packed["feedback"].append(START)
        packed["gap"].append(0)
        shown: list[int] = []  # times
        for item, feedback, time in events[first:]:
            if feedback in SHOWN[view] and any(time < moment for moment in moments):
                packed["item"].append(item)
                packed["feedback"].append(feedback)
                packed["gap"].append(reference_gap(time - shown[-1]) if shown else 0)
                shown.append(time)
        packed["cu_seqlens"].append(len(packed["item"]))
        for moment in moments:
            visible = [time for time in shown if time < moment]
            packed["prefix"].append(1 + len(visible))
            packed["branch_gap"].append(reference_gap(moment - visible[-1]) if visible else 0)
            seen = sorted({item for item, _, time in events if time < moment})
            packed["seen_item"].extend(seen)
            packed["seen_cu"].append(len(packed["seen_item"]))
            for level in range(levels):
                nodes, rows = packed["seen_node"][level], packed["seen_request"][level]
                for node in sorted({item_nodes[item, level] for item in seen}):
                    nodes.append(node)
                    rows.append(requests)
                    packed["seen_count"][level].append(sum(item_nodes[item, level] == node for item in seen))
                here = list(zip(rows, nodes, strict=True))
                packed["seen_slot"][level].extend(here.index((requests, item_nodes[item, level])) for item in seen)
            requests += 1
    return packed


def lists(packed: PackedHistories) -> dict[str, list]:
    return {
        name: [a.tolist() for a in value] if isinstance(value, list) else value.tolist()
        for name, value in vars(packed).items()
    }


def random_request(rng: np.random.Generator, log: EventLog, size: int, branches: int) -> dict:
    """Histories without branches and several branches at one moment are frequent."""
    users = rng.integers(0, log.n_users, size).astype(np.int32)
    low, high = (int(log.time.min()), int(log.time.max())) if len(log) else (0, 1)
    moments = rng.integers(low - 2, high + 3, branches)
    at_an_event = rng.random(branches) < 0.5
    if len(log):
        moments[at_an_event] = rng.choice(log.time, at_an_event.sum()) + rng.integers(0, 2, at_an_event.sum())
    return {
        "users": users,
        "first": rng.integers(0, np.diff(log.user_offsets)[users] + 1),
        "views": rng.integers(0, 4, size).astype(np.uint8),
        "branch_history": np.sort(rng.integers(0, max(size, 1), branches)).astype(np.int32),
        "moments": moments,
    }


def random_nodes(rng: np.random.Generator, items: int) -> np.ndarray:
    levels, codebook = int(rng.integers(1, 5)), 40
    codes = rng.permutation(codebook)[:items, None] // [8 ** (levels - 1 - k) for k in range(levels)]
    codes[:, -1] = rng.permutation(codebook)[:items]  # distinct rows under shared prefixes
    return build_trie(codes.astype(np.uint16), codebook).item_nodes


def random_case(rng: np.random.Generator) -> tuple[EventLog, int]:
    """A log whose moments are seconds, hours or days apart, at the resolution of its shard."""
    users, items, longest = int(rng.integers(1, 30)), int(rng.integers(1, 40)), int(rng.integers(0, 40))
    log = random_log(rng, users=users, items=items, longest=longest)
    seconds, unit = int(rng.choice([1, 50, 9_000, DAY, 400 * DAY])), int(rng.choice([1, DAY]))
    return replace(log, time=log.time * seconds // unit * unit), unit


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), threads=st.integers(1, 3), size=st.integers(0, 60), branches=st.integers(0, 150))
def test_pack_follows_the_definitions(tmp_path_factory, seed, threads, size, branches):
    rng = np.random.default_rng(seed)
    log, unit = random_case(rng)
    path = tmp_path_factory.mktemp("pack") / "events.nfs"
    write_shard(path, log, unit)
    nodes = random_nodes(rng, log.n_items)
    request = random_request(rng, log, size, branches if size else 0)
    packed = open_shard(path).pack(**request, item_nodes=nodes, threads=threads)
    expected = reference_pack(log, request, nodes)
    for name, found in lists(packed).items():
        assert found == expected[name], name
    dtypes = {name: value.dtype for name, value in vars(packed).items() if name not in PER_LEVEL}
    assert {name for name, dtype in dtypes.items() if dtype == np.uint8} == {"feedback", "gap", "branch_gap"}
    assert {dtype for dtype in dtypes.values() if dtype != np.uint8} == {np.dtype(np.int32)}
    assert {a.dtype for name in PER_LEVEL for a in getattr(packed, name)} == {np.dtype(np.int32)}


def branch_parts(packed: PackedHistories, request: dict, a: int) -> list:
    """All that a branch reads: the positions that it sees, its gap, its seen items and nodes."""
    start = packed.cu_seqlens[request["branch_history"][a]]
    positions = slice(start, start + packed.prefix[a])
    parts = [column[positions].tolist() for column in (packed.item, packed.feedback, packed.gap)]
    items = slice(packed.seen_cu[a], packed.seen_cu[a + 1])
    parts += [int(packed.branch_gap[a]), packed.seen_item[items].tolist()]
    for node, row, count, slot in zip(*(getattr(packed, name) for name in PER_LEVEL), strict=True):
        parts += [node[row == a].tolist(), count[row == a].tolist(), node[slot[items]].tolist()]
    return parts


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_events_at_or_after_a_moment_change_nothing_that_its_branch_reads(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    log, unit = random_case(rng)
    folder = tmp_path_factory.mktemp("pack")
    nodes, request = random_nodes(rng, log.n_items), random_request(rng, log, 8, 20)
    a = int(rng.integers(20))
    user, moment = request["users"][request["branch_history"][a]], int(request["moments"][a])
    # The user's later events become others, and some more.
    low, high = log.user_offsets[user], log.user_offsets[user + 1]
    kept = low + int(np.searchsorted(log.time[low:high], moment))
    more = int(rng.integers(1, 6))
    n = high - kept + more
    time = np.sort(-(-moment // unit) * unit + unit * rng.integers(0, 50, n))
    time[0] = -(-moment // unit) * unit  # the moment itself, at the shard's resolution
    columns = [rng.integers(0, log.n_items, n), rng.integers(0, 4, n), time]
    item, feedback, time = (
        np.concatenate([old[:kept], new.astype(old.dtype), old[high:]])
        for old, new in zip((log.item, log.feedback, log.time), columns, strict=True)
    )
    offsets = log.user_offsets + more * (np.arange(log.n_users + 1) > user)
    found = []
    for name, one in (("a", log), ("b", EventLog(offsets, item, feedback, time, None, log.n_items))):
        write_shard(folder / name, one, unit)
        found.append(branch_parts(open_shard(folder / name).pack(**request, item_nodes=nodes), request, a))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0, 1), (63, 1), (64, 2), (127, 2), (128, 3), (DAY, 12), (2**27 - 1, 22), (2**27, 23), (2**31, 23)],
)
def test_gaps_are_buckets_of_seconds(tmp_path, seconds, bucket):
    time = np.array([-7, seconds - 7])
    log = EventLog(np.array([0, 2]), np.zeros(2, np.int32), np.ones(2, np.uint8), time, None, 1)
    write_shard(tmp_path / "events.nfs", log)
    packed = open_shard(tmp_path / "events.nfs").pack(
        users=np.zeros(2, np.int32),
        first=np.zeros(2, np.int64),
        views=np.full(2, MIXED, np.uint8),
        branch_history=np.array([0, 1], np.int32),
        moments=np.array([time[1] + 1, time[1] + max(seconds, 1)]),
        item_nodes=np.zeros((1, 1), np.int32),
    )
    assert packed.gap.tolist() == [0, 0, bucket] * 2
    assert packed.branch_gap.tolist() == [1, bucket]
    assert (packed.prefix.tolist(), packed.seen_cu.tolist()) == ([3, 3], [0, 1, 2])


def test_any_moment_of_64_bits_is_one(packable):
    shard, request, nodes = packable
    ends = np.iinfo(np.int64)
    request["moments"][:2] = ends.min, ends.max
    request["branch_history"][:2] = 0
    packed = shard.pack(**request, item_nodes=nodes)
    assert packed.branch_gap[:2].tolist() == [0, GAPS - 1 if packed.prefix[1] > 1 else 0]


@pytest.fixture
def packable(tmp_path) -> tuple[Shard, dict, np.ndarray]:
    """A shard of 5 users and 7 items, 4 histories with 6 branches of it, and the nodes of its items."""
    rng = np.random.default_rng(5)
    log = random_log(rng, users=5, items=7, longest=9)
    write_shard(tmp_path / "events.nfs", log)
    nodes = build_trie(np.arange(14, dtype=np.uint16).reshape(7, 2), 20).item_nodes
    request = random_request(rng, log, 4, 6)
    request["branch_history"][:] = 0, 0, 1, 2, 2, 3
    return open_shard(tmp_path / "events.nfs"), request, nodes


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("users", 99, "found user 99, expected 0 to 4"),
        ("users", -1, "found user -1"),
        ("views", 4, "history 2: found view 4, expected 0 to 3"),
        ("first", -1, "history 2: found first event -1, expected 0 to "),
        ("first", 99, "history 2: found first event 99, expected 0 to "),
        ("branch_history", -1, r"branch 2: found history -1, expected 0 to 3 \(ascending\)"),
        ("branch_history", 4, r"branch 2: found history 4, expected 0 to 3 \(ascending\)"),
        ("branch_history", 3, r"branch 3: found history 2, expected 3 to 3 \(ascending\)"),
    ],
)
def test_histories_and_branches_out_of_range_are_refused(packable, field, value, message):
    shard, request, nodes = packable
    request[field][2] = value
    with pytest.raises(InputError, match=message):
        shard.pack(**request, item_nodes=nodes)


@pytest.mark.parametrize("field", ["first", "views", "moments"])
def test_lengths_that_differ_are_refused(packable, field):
    shard, request, nodes = packable
    expected = len(request[field])
    request[field] = request[field][:-1].copy()
    with pytest.raises(InputError, match=f"{field}: found {expected - 1} entries, expected {expected}"):
        shard.pack(**request, item_nodes=nodes)


def test_nodes_that_do_not_fit_the_items_are_refused(packable):
    shard, request, nodes = packable
    for table in (nodes[:-1].copy(), nodes[:, :0].copy()):
        with pytest.raises(InputError, match=r"item nodes: found . rows of . levels, expected 7 rows or more"):
            shard.pack(**request, item_nodes=table)
    swapped = np.stack([nodes[::-1, 0], nodes[:, 1]], axis=1)
    request["moments"][:] = 99
    with pytest.raises(InputError, match="level 1 is not numbered in the order of the leaves"):
        shard.pack(**request, item_nodes=swapped)
