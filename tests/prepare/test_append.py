"""Appending to a data set: it reads as if it had been written at once, and a crash leaves what was there."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from negfast.data.dataset import MANIFEST, VERIFIED, Dataset, write_dataset
from negfast.data.items import ItemTable
from negfast.data.log import DAY, EventLog
from negfast.errors import InputError
from negfast.files import locked
from negfast.prepare.append import append_events
from negfast.prepare.events import Events
from negfast.runtime.inspection import describe, report

ITEMS = ["a", "b", "c"]


def events_of(rows: list[tuple[str, int, int, int]], with_values: bool = True) -> Events:
    """Rows (user id, time, item, feedback); an event's value is its time."""
    user_ids = sorted({row[0] for row in rows})
    rows = sorted(rows, key=lambda row: (row[0], row[1]))
    offsets = np.concatenate([[0], np.cumsum([sum(row[0] == u for row in rows) for u in user_ids])])
    time, item, feedback = (np.array([row[k] for row in rows]) for k in (1, 2, 3))
    value = time.astype(np.float32) if with_values else None
    log = EventLog(offsets, item.astype(np.int32), feedback.astype(np.uint8), time, value, len(ITEMS))
    return Events(log, user_ids, ITEMS)


def random_day(rng: np.random.Generator, day: int, users: int) -> list[tuple[str, int, int, int]]:
    n = int(rng.integers(1, 40))
    return [
        (f"u{u}", int(t), int(i), int(f))
        for u, t, i, f in zip(
            rng.integers(0, users, n), day * DAY + np.sort(rng.choice(DAY, n, replace=False)), rng.integers(0, 3, n),
            rng.integers(0, 3, n), strict=True,
        )
    ]  # fmt: skip


def write(path, events: Events) -> None:
    path.mkdir()
    sids = {name: np.zeros((3, 1), np.uint16) for name in ("codes", "codebooks", "embedding")}
    exposed, likes, dislikes = np.bincount(events.log.feedback, minlength=3).tolist()
    counts = {"users": events.log.n_users, "items": 3, "events": len(events.log)}
    manifest: dict[str, Any] = {
        "negfast": "0",
        "sources": {},
        "counts": counts | {"exposed": exposed, "likes": likes, "dislikes": dislikes},
        "days": {"first": "1970-01-01", "last": "1970-01-01"},
        "split": {"horizon": 1, "valid": "1970-01-02", "test": "1970-01-03"},
        "semantic_ids": {"levels": 1, "codebook": 1, "quantizer": "none", "report": {}},
    }
    write_dataset(path, events.log, events.user_ids, ItemTable(ITEMS, [""] * 3, {}), sids, manifest)


def rows_of(data: Dataset) -> list[tuple]:
    log = data.log
    ids = [data.user_ids[u] for u in log.user]
    columns = [c.tolist() for c in (log.time, log.item, log.feedback)]
    values = [None] * len(log) if log.value is None else log.value.tolist()
    return sorted(zip(ids, *columns, values, strict=True))


@pytest.mark.parametrize("with_values", [True, False])
def test_appended_days_read_as_one_log(tmp_path, with_values):
    rng = np.random.default_rng()
    path = tmp_path / "data"
    days = [random_day(rng, day, users=4 + 2 * day) for day in range(4)]
    write(path, events_of(days[0], with_values))
    base = {file.name: file.read_bytes() for file in path.glob("[!.]*") if file.name != MANIFEST}
    for day in days[1:]:
        data = append_events(path, events_of(day, with_values), {"name": "day.csv"})
    assert base == {name: (path / name).read_bytes() for name in base}
    expected = [(*row, float(np.float32(row[1])) if with_values else None) for day in days for row in day]
    assert rows_of(data) == sorted(expected)
    log = data.log
    for u in range(log.n_users):
        assert (np.diff(log.time[log.user_offsets[u] : log.user_offsets[u + 1]]) > 0).all()
        if log.value is not None:
            times = log.time[log.user_offsets[u] : log.user_offsets[u + 1]]
            np.testing.assert_array_equal(log.value[log.user_offsets[u] : log.user_offsets[u + 1]], np.float32(times))
    counts = data.manifest["counts"]
    assert (counts["events"], counts["users"]) == (len(expected), len(data.user_ids))
    assert [counts[k] for k in ("exposed", "likes", "dislikes")] == np.bincount(log.feedback, minlength=3).tolist()
    assert data.manifest["days"]["last"] == "1970-01-04"
    data.verify()
    lines: list[str] = []
    report(describe(path), lines.append)
    assert sum(line.startswith("part ") for line in lines) == 3
    assert any("events.nfs.000003" in line and line.endswith("ok") for line in lines)


def test_a_crash_leaves_the_old_data_set_and_the_next_append_succeeds(tmp_path, monkeypatch):
    """The process dies before each rename in turn, as the file system would show it afterwards."""
    path = tmp_path / "data"
    write(path, events_of([("u0", 5, 0, 2)]))
    day = events_of([("u0", DAY, 1, 1), ("u1", DAY + 1, 2, 2)])
    replace, renames = os.replace, 0

    class Died(BaseException):
        pass

    def dying(source, target):
        nonlocal renames
        if Path(target).name == VERIFIED:
            return replace(source, target)
        if renames == 0:
            raise Died
        renames -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    for survived in range(3):  # users, values, manifest; the shard's own rename is in C++ and comes first
        renames = survived
        with pytest.raises(Died):
            append_events(path, day)
        assert rows_of(Dataset.open(path)) == [("u0", 5, 0, 2, 5.0)]
        Dataset.open(path).verify()
    monkeypatch.undo()
    other = events_of([("u2", DAY, 1, 1)])
    assert [row[0] for row in rows_of(append_events(path, other))] == ["u0", "u2"]


def test_every_flipped_byte_of_a_part_is_found(tmp_path):
    path = tmp_path / "data"
    write(path, events_of([("u0", 5, 0, 2)]))
    data = append_events(path, events_of([("u0", DAY, 1, 1), ("u1", DAY + 1, 2, 2)]))
    assert [part["files"] for part in data.parts] == [
        ["events.nfs.000001", "users.parquet.000001", "values.safetensors.000001"]
    ]
    rng = np.random.default_rng()
    for name in data.parts[0]["files"]:
        good = (path / name).read_bytes()
        for position in rng.integers(0, len(good), 12):
            (path / name).write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
            with pytest.raises(InputError, match=name):
                Dataset.open(path).verify()
        (path / name).write_bytes(good[:-1])
        with pytest.raises(InputError, match=f"{name}: {len(good) - 1} bytes, expected {len(good)}"):
            Dataset.open(path)
        (path / name).unlink()
        with pytest.raises(InputError, match=f"{name}: missing"):
            Dataset.open(path)
        (path / name).write_bytes(good)


def test_what_does_not_continue_the_data_set_is_refused(tmp_path):
    path = tmp_path / "data"
    write(path, events_of([("u0", 5, 0, 2), ("u1", 9, 0, 1)]))
    before = sorted(file.name for file in path.glob("[!.]*"))
    manifest = (path / MANIFEST).read_text()
    late, fine = events_of([("u1", 8, 0, 1)]), events_of([("u1", 10, 0, 1)])
    with pytest.raises(InputError, match="found an event of user 1 at 8, expected none before its last one, 9"):
        append_events(path, late)
    with pytest.raises(InputError, match="found no values in the events to append, expected some"):
        append_events(path, events_of([("u1", 10, 0, 1)], with_values=False))
    with pytest.raises(InputError, match="found events on other items"):
        append_events(path, Events(fine.log, fine.user_ids, ["a", "c", "b"]))
    with pytest.raises(InputError, match="no such data set"):
        append_events(tmp_path / "other", fine)
    assert sorted(file.name for file in path.glob("[!.]*")) == before
    assert (path / MANIFEST).read_text() == manifest
    with locked(path), pytest.raises(InputError, match="is being written by process"):
        append_events(path, fine)
    append_events(path, fine)
    assert len(json.loads((path / MANIFEST).read_text())["parts"]) == 1


def test_the_data_set_says_what_it_extends(tmp_path):
    """So runs that were trained on it go on serving."""
    path = tmp_path / "data"
    write(path, events_of([("u0", 5, 0, 2)]))
    found = [Dataset.open(path).fingerprint]
    for day in (1, 2):
        data = append_events(path, events_of([("u0", day * DAY, 1, 1)]))
        assert data.extends == found and data.fingerprint not in found
        found.append(data.fingerprint)
