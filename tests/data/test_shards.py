"""Shards give back what was written, whatever the resolution, thread count and way of building."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.data.log import DAY, EventLog
from negfast.data.shards import ShardBuilder, append_shard, describe_shard, open_shard, write_shard
from negfast.errors import InputError

from .shard_logs import random_log


def columns(log: EventLog, time_unit: int = 1) -> list[list[int]]:
    time = log.time // time_unit * time_unit
    return [log.user_offsets.tolist(), log.item.tolist(), log.feedback.tolist(), time.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    users=st.integers(0, 300),
    items=st.integers(1, 5000),
    longest=st.sampled_from([0, 1, 7, 60]),
    times=st.sampled_from([1, 50, 10**6, 2**31]),
    time_unit=st.sampled_from([1, 60, DAY]),
)
def test_reads_what_was_written(tmp_path_factory, seed, users, items, longest, times, time_unit):
    rng = np.random.default_rng(seed)
    log = random_log(rng, users, items, longest, times)
    folder = tmp_path_factory.mktemp("shard")
    write_shard(folder / "one.nfs", log, time_unit, threads=1)
    write_shard(folder / "two.nfs", log, time_unit, threads=2)
    assert (folder / "one.nfs").read_bytes() == (folder / "two.nfs").read_bytes()
    shard = open_shard(folder / "one.nfs")
    assert (shard.n_users, shard.n_items, shard.n_events) == (users, items, len(log))
    assert [c.tolist() for c in shard.get_many()] == columns(log, time_unit)

    # Some users, in any order, some of them twice.
    some = rng.integers(0, users, 20 if users else 0).astype(np.int32)
    offsets, item, feedback, time = shard.get_many(some, threads=2)
    events = [i for u in some for i in range(log.user_offsets[u], log.user_offsets[u + 1])]
    assert np.diff(offsets).tolist() == np.diff(log.user_offsets)[some].tolist()
    assert item.tolist() == log.item[events].tolist()
    assert feedback.tolist() == log.feedback[events].tolist()
    assert time.tolist() == (log.time[events] // time_unit * time_unit).tolist()


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_tokens_are_the_rows_of_the_items(tmp_path, levels, dtype):
    rng = np.random.default_rng(levels)
    log = random_log(rng, 90, 70, 40)
    write_shard(tmp_path / "events.nfs", log)
    table = rng.integers(0, 60_000, (70, levels)).astype(dtype)
    users = rng.permutation(90).astype(np.int32)
    shard = open_shard(tmp_path / "events.nfs")
    offsets, item, _, _ = shard.get_many(users)
    found_offsets, tokens = shard.tokens(users, table, threads=2)
    assert found_offsets.tolist() == offsets.tolist()
    assert tokens.dtype == dtype
    assert tokens.tolist() == table[item].tolist()
    with pytest.raises(InputError, match="table: found 69 entries, expected 70"):
        shard.tokens(users, table[:69])


def test_gives_columns_in_the_callers_arrays(tmp_path):
    log = random_log(np.random.default_rng(0), 50, 30, 20)
    write_shard(tmp_path / "events.nfs", log)
    out = np.full(5000, -7, np.int32), np.full(5000, 9, np.uint8), np.full(5000, -7, np.int64)
    _, item, feedback, time = open_shard(tmp_path / "events.nfs").get_many(out=out)
    assert all(column.base is given for column, given in zip((item, feedback, time), out, strict=True))
    assert item.tolist() == log.item.tolist()
    assert (out[0][len(log) :] == -7).all()


def test_a_history_longer_than_16_bit_offsets(tmp_path):
    rng = np.random.default_rng(3)
    lengths = [3, 200_000, 0, 70_000, 5]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    n = int(offsets[-1])
    time = np.concatenate([np.sort(rng.integers(0, 10**9, k)) for k in lengths])
    item, feedback = rng.integers(0, 900, n).astype(np.int32), rng.integers(0, 3, n).astype(np.uint8)
    log = EventLog(offsets, item, feedback, time, None, 900)
    write_shard(tmp_path / "events.nfs", log)
    assert [c.tolist() for c in open_shard(tmp_path / "events.nfs").get_many()] == columns(log)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32), users=st.integers(1, 6000), events=st.integers(0, 6000), unit=st.sampled_from([1, DAY])
)
def test_builder_sorts_events_of_any_order(tmp_path_factory, seed, users, events, unit):
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, users, events).astype(np.int32), rng.integers(0, 50, events).astype(np.int32)
    feedback, time = rng.integers(0, 3, events).astype(np.uint8), rng.integers(0, 3 * DAY, events) // 9999 * 9999
    folder = tmp_path_factory.mktemp("build")
    for threads in (1, 2):  # at most 1024 events are kept in memory: several runs are merged
        builder = ShardBuilder(folder / f"{threads}.nfs", users, 50, unit, memory_bytes=1)
        for a in range(0, events, 700):
            builder.add(*(c[a : a + 700] for c in (user, item, feedback, time)))
        builder.finish(threads)
    order = np.lexsort((time, user))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))])
    log = EventLog(offsets, item[order], feedback[order], time[order], None, 50)
    write_shard(folder / "sorted.nfs", log, unit)
    assert (folder / "1.nfs").read_bytes() == (folder / "2.nfs").read_bytes() == (folder / "sorted.nfs").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["1.nfs", "2.nfs", "sorted.nfs"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), unit=st.sampled_from([1, DAY]))
def test_appended_days_read_as_one_log(tmp_path_factory, seed, unit):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("append") / "events.nfs"
    days, users, items = [], 30, 20
    for day in range(4):
        users, items = users + int(rng.integers(0, 5)), items + int(rng.integers(0, 5))
        n = int(rng.integers(1, 120))
        user, item = rng.integers(0, users, n).astype(np.int32), rng.integers(0, items, n).astype(np.int32)
        feedback, time = rng.integers(0, 3, n).astype(np.uint8), day * DAY + rng.integers(0, DAY, n)
        days.append((user, item, feedback, time))
        if day == 0:
            builder = ShardBuilder(path, users, items, unit)
            builder.add(*days[0])
            builder.finish()
            base = path.read_bytes()
        else:
            append_shard(path, *days[-1], n_users=users, n_items=items)
    assert path.read_bytes() == base
    user, item, feedback, time = (np.concatenate(column) for column in zip(*days, strict=True))
    order = np.lexsort((time, user))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))])
    log = EventLog(offsets, item[order], feedback[order], time[order], None, items)
    shard = open_shard(path)
    assert (shard.n_users, shard.n_items, shard.n_events) == (users, items, len(log))
    assert [c.tolist() for c in shard.get_many(threads=2)] == columns(log, unit)
    some = rng.integers(0, users, 40).astype(np.int32)
    assert shard.get_many(some)[1].tolist() == [i for u in some for i in log.item[offsets[u] : offsets[u + 1]]]

    write_shard(path, log, unit)  # anew: what was appended belongs to the old file
    assert open_shard(path).n_events == len(log)


def test_an_event_before_the_last_one_is_not_appended(tmp_path):
    log = EventLog(np.array([0, 2, 3]), np.zeros(3, np.int32), np.ones(3, np.uint8), np.array([5, 9, 7]), None, 1)
    path = tmp_path / "events.nfs"
    write_shard(path, log)
    new = np.zeros(2, np.int32), np.ones(2, np.uint8), np.array([9, 6])
    with pytest.raises(InputError, match="found an event of user 1 at 6, expected none before its last one, 7"):
        append_shard(path, np.array([0, 1], np.int32), *new, n_users=2, n_items=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.nfs"]


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("item", 3, 50, "user 1: found item 50, expected 0 to 19"),
        ("item", 3, -1, "user 1: found item -1"),
        ("feedback", 0, 4, "user 0: found feedback 4, expected 0 to 3"),
        ("time", 5, 1, "user 1: found time 1 after a later one"),
        ("time", 5, 2**33, "user 1: found times 2\\^32 units apart"),
        ("time", 5, 2**60, "user 1: found time 1152921504606846976, expected at most 2\\^53 seconds from 1970"),
    ],
)
def test_events_that_cannot_be_stored_are_refused(tmp_path, column, row, value, message):
    arrays: dict[str, np.ndarray] = {
        "item": np.arange(6, dtype=np.int32),
        "feedback": np.ones(6, np.uint8),
        "time": np.arange(10, 16),
    }
    arrays[column][row] = value
    log = EventLog(np.array([0, 3, 6]), arrays["item"], arrays["feedback"], arrays["time"], None, 20)
    with pytest.raises(InputError, match=message):
        write_shard(tmp_path / "events.nfs", log)
    assert not list(tmp_path.iterdir())


def test_description_adds_up(tmp_path):
    rng = np.random.default_rng(8)
    path = tmp_path / "events.nfs"
    log = random_log(rng, 400, 100, 200, times=10**7)
    write_shard(path, log)
    facts = describe_shard(path)
    assert sum(facts["bytes"].values()) == 2 * path.stat().st_size
    share = np.bincount(log.item) / len(log)
    assert facts["order0_floor"]["item"] == pytest.approx(-(share[share > 0] * np.log2(share[share > 0])).sum())
    assert facts["bits_per_event"]["items"] > facts["order0_floor"]["item"] + facts["order0_floor"]["feedback"] - 1e-9
    assert facts["bits_per_event"]["items"] < 1.05 * (facts["order0_floor"]["item"] + facts["order0_floor"]["feedback"])
