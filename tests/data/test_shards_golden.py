"""Files written by the first version of the format: every later one must read them, and write the same bytes."""

import json
from pathlib import Path

import numpy as np
import pytest

from negfast.data.log import DAY, WITHDRAWN, EventLog
from negfast.data.shards import append_shard, open_shard, write_shard

GOLDEN = Path(__file__).parent / "golden"
EVENTS = json.loads((GOLDEN / "events.json").read_text())
APPENDED = ([3, 131], [41, 0], [2, 1], [1_800_000_000, 1_800_000_001])
DTYPES = np.int32, np.int32, np.uint8, np.int64


def golden_log() -> EventLog:
    offsets, item, feedback, time = (EVENTS[k] for k in ("user_offsets", "item", "feedback", "time"))
    columns = np.array(item, np.int32), np.array(feedback, np.uint8), np.array(time)
    return EventLog(np.array(offsets), *columns, None, EVENTS["n_items"])


def with_withdrawals() -> EventLog:
    """Every seventh event takes feedback back, which the first version did not know (shard feature bit 4)."""
    log = golden_log()
    log.feedback[::7] = WITHDRAWN
    return log


def test_reads_seconds():
    found = open_shard(GOLDEN / "seconds.nfs").get_many()
    assert [c.tolist() for c in found] == [EVENTS[k] for k in ("user_offsets", "item", "feedback", "time")]


def test_reads_days_with_an_appended_part():
    shard = open_shard(GOLDEN / "days.nfs")
    assert (shard.n_users, shard.n_items) == (132, 42)
    offsets, item, feedback, time = shard.get_many(np.array([3, 130, 131], np.int32))
    old = slice(EVENTS["user_offsets"][3], EVENTS["user_offsets"][4])
    assert np.diff(offsets).tolist() == [old.stop - old.start + 1, 0, 1]
    assert item.tolist() == [*EVENTS["item"][old], 41, 0]
    assert feedback.tolist() == [*EVENTS["feedback"][old], 2, 1]
    assert time.tolist() == [t // DAY * DAY for t in [*EVENTS["time"][old], *APPENDED[3]]]


@pytest.mark.parametrize(("name", "unit"), [("seconds.nfs", 1), ("days.nfs", DAY)])
def test_writes_the_same_bytes(tmp_path, name, unit):
    write_shard(tmp_path / name, golden_log(), unit, threads=2)
    assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()
    if unit == DAY:
        user, item, feedback, time = (np.array(c, d) for c, d in zip(APPENDED, DTYPES, strict=True))
        part = append_shard(tmp_path / name, user, item, feedback, time, n_users=132, n_items=42)
        assert part.read_bytes() == (GOLDEN / part.name).read_bytes()
        parts = f"{name}.parts"
        assert json.loads((tmp_path / parts).read_text()) == json.loads((GOLDEN / parts).read_text())


def test_withdrawals_have_golden_bytes_too(tmp_path):
    log, golden = with_withdrawals(), GOLDEN / "withdrawn.nfs"
    write_shard(tmp_path / golden.name, log, 1)
    assert (tmp_path / golden.name).read_bytes() == golden.read_bytes()
    found = open_shard(golden).get_many()
    for column, expected in zip(found, (log.user_offsets, log.item, log.feedback, log.time), strict=True):
        np.testing.assert_array_equal(column, expected)
