"""Preparing a data set: what is written, the dates that are chosen, nothing half-written, replacement only by force."""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import negfast.sid.build
from negfast.data.dataset import Dataset, date_of, day_of
from negfast.data.log import DISLIKE, EventLog
from negfast.data.split import DayCounts, all_requests
from negfast.errors import InputError
from negfast.prepare.build import SemanticIdSettings, SplitSettings, choose_split, prepare
from negfast.prepare.events import EventMapping, ItemMapping, read_items
from negfast.prepare.reading import read_events
from negfast.prepare.rules import parse_rule

T0, DAY = 1_371_000_000, 86_400
MAPPING = EventMapping(dislike=(parse_rule("rating<=5"),), value="rating")
ITEM_MAPPING = ItemMapping(text="title", attributes=(("genres", "|"),))
SIDS = SemanticIdSettings(levels=3, codebook=8, encoder="tfidf", seed=3)


def silent(_):
    pass


SETTINGS: dict[str, Any] = {
    **{"mapping": MAPPING, "item_mapping": ITEM_MAPPING, "split": SplitSettings()},
    **{"semantic_ids": SIDS, "report": silent},
}


@pytest.fixture
def sources(tmp_path):
    """An event log and an item table of 30 items in a folder of their own."""
    rng = np.random.default_rng()
    folder = tmp_path / "source"
    folder.mkdir()
    rows = [f"u{user},{day // 2},{rng.integers(1, 11)},{T0 + day * DAY}" for day in range(60) for user in range(6)]
    rng.shuffle(rows)
    (folder / "log.csv").write_text("\n".join(["user,item,rating,time", *rows]) + "\n")
    titles = [f"{i},Title {i} {rng.integers(5)},{'Crime|Drama' if i % 2 else ''}" for i in range(30)]
    (folder / "items.csv").write_text("\n".join(["item,title,genres", *titles]) + "\n")
    return folder


def run(sources, out, **options):
    return prepare([sources / "log.csv"], sources / "items.csv", out, **SETTINGS | options)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.name[0] != "." and path.is_file()
    }


def test_events_written_twice_are_counted_out_loud(sources, tmp_path):
    said: list[str] = []
    run(sources, tmp_path / "clean", report=said.append)
    assert not [line for line in said if line.startswith("repeats")]
    lines = (sources / "log.csv").read_text().splitlines()
    user, item, rating, time = lines[5].split(",")
    later = f"{user},{item},{rating},{int(time) + 1}"
    (sources / "log.csv").write_text("\n".join([*lines, lines[9], lines[9], later, lines[30]]) + "\n")
    run(sources, tmp_path / "twice", report=said.append)
    assert [line.split()[1] for line in said if line.startswith("repeats")] == ["3"]
    assert len(Dataset.open(tmp_path / "twice").log) == len(Dataset.open(tmp_path / "clean").log) + 4


def test_everything_reads_back(sources, tmp_path):
    embedding = np.random.default_rng().normal(size=(30, 4)).astype(np.float32)
    np.save(sources / "embedding.npy", embedding)
    out = tmp_path / "new" / "data"
    run(sources, out, item_embedding=sources / "embedding.npy")
    data = Dataset.open(out)

    items = read_items(sources / "items.csv", ITEM_MAPPING, sources / "embedding.npy")
    events, _ = read_events([sources / "log.csv"], MAPPING, silent, items=items)
    assert data.user_ids == events.user_ids
    for column in ("user_offsets", "item", "feedback", "time", "value"):
        np.testing.assert_array_equal(getattr(data.log, column), getattr(events.log, column))
        assert getattr(data.log, column).dtype == getattr(events.log, column).dtype
    assert data.log.n_items == 30
    assert (data.items.ids, data.items.text, data.items.attributes) == (items.ids, items.text, items.attributes)
    np.testing.assert_array_equal(data.items.embedding, embedding)
    assert data.codes.shape == (30, 3)
    assert len(np.unique(data.codes, axis=0)) == 30
    assert len(data.embedding) == 30
    table = parquet.read_table(out / "items.parquet")
    assert table["codes"].to_pylist() == data.codes.tolist()
    data.verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]


def test_the_manifest_says_what_was_done(sources, tmp_path):
    manifest = run(sources, tmp_path / "data").manifest
    ratings = [int(line.split(",")[2]) for line in (sources / "log.csv").read_text().split()[1:]]
    dislikes = sum(rating <= 5 for rating in ratings)
    counts = {"users": 6, "items": 30, "events": 360, "dislikes": dislikes, "likes": 360 - dislikes, "exposed": 0}
    assert manifest["counts"] == counts
    assert manifest["days"] == {"first": "2013-06-12", "last": "2013-08-10"}
    assert manifest["mapping"]["dislike"] == ["rating<=5"]
    assert manifest["semantic_ids"]["report"]["blocks"].keys() == {"tfidf"}
    for name in ("log.csv", "items.csv"):
        data = (sources / name).read_bytes()
        recorded = manifest["sources"]["events" if name == "log.csv" else "items"]
        assert recorded == {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "data").glob("[!.]*")} - {"manifest.json"}
    assert str(tmp_path) not in json.dumps(manifest)


def test_several_event_files_are_named_in_the_manifest(sources, tmp_path):
    header, *rows = (sources / "log.csv").read_text().split()
    parts = [sources / "a.csv", sources / "b.csv"]
    for part, some in zip(parts, (rows[:200], rows[200:]), strict=True):
        part.write_text("\n".join([header, *some]) + "\n")
    joined = prepare(parts, sources / "items.csv", tmp_path / "joined", **SETTINGS)
    names = {key: source["name"] for key, source in joined.manifest["sources"].items()}
    assert names == {"events": "a.csv", "events 2": "b.csv", "items": "items.csv"}
    whole = run(sources, tmp_path / "whole")
    files = [{**data.manifest["files"]} for data in (joined, whole)]
    assert files[0] == files[1]


def test_preparing_twice_gives_the_same_bytes(sources, tmp_path):
    run(sources, tmp_path / "a")
    lines = (sources / "log.csv").read_text().split("\n")[1:-1]
    np.random.default_rng().shuffle(lines)  # one event a user and second: the order of lines does not matter
    (sources / "log.csv").write_text("\n".join(["user,item,rating,time", *lines]))
    run(sources, tmp_path / "b")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name for name in a if a[name] != b[name]} <= {p for p in a if p.name == "manifest.json"}
    assert Dataset.open(tmp_path / "a").manifest["counts"] == Dataset.open(tmp_path / "b").manifest["counts"]


def test_without_an_item_table(sources, tmp_path):
    data = prepare(
        [sources / "log.csv"], None, tmp_path / "data", mapping=MAPPING, item_mapping=ItemMapping(),
        split=SplitSettings(), semantic_ids=SIDS, report=silent,
    )  # fmt: skip
    assert data.items.ids == [str(item) for item in range(30)]
    assert data.items.text == [""] * 30
    assert len(np.unique(data.codes, axis=0)) == 30


def test_the_split_is_the_one_that_was_said(sources, tmp_path):
    said: list[str] = []
    data = run(sources, tmp_path / "data", split=SplitSettings(5, "2013-07-01", "2013-07-20"), report=said.append)
    split = data.split()
    assert (split.horizon, date_of(split.valid_day), date_of(split.test_day)) == (5, "2013-07-01", "2013-07-20")
    assert f"test: {len(split.test):,} active user-days" in "\n".join(said)


@given(first=st.integers(0, 20_000), days=st.integers(1, 200), horizon=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_chosen_dates_leave_days_to_every_part(first, days, horizon):
    days_of_log = np.arange(first, first + days)
    log = EventLog(
        np.array([0, days]), np.zeros(days, np.int32), np.zeros(days, np.uint8), days_of_log * DAY + 5, None, 1
    )
    counts = days_of(log, horizon)
    if days < 3 * horizon + 3:
        with pytest.raises(InputError, match="smaller --horizon"):
            choose_split(counts, SplitSettings(horizon), silent)
        return
    valid, test = choose_split(counts, SplitSettings(horizon), silent)
    train_days = sum(day + horizon < valid for day in days_of_log)
    valid_days = sum(valid <= day and day + horizon < test for day in days_of_log)
    test_days = sum(test <= day and day + horizon <= days_of_log[-1] for day in days_of_log)
    assert train_days >= max(valid_days, test_days) >= 1
    assert min(valid_days, test_days) >= 1
    assert train_days + valid_days + test_days == days - 3 * horizon
    # the same dates given are taken, and said to be the extremes when they are
    assert choose_split(counts, SplitSettings(horizon, date_of(valid), date_of(test)), silent) == (valid, test)
    with pytest.raises(InputError, match="--valid"):
        choose_split(counts, SplitSettings(horizon, date_of(first + horizon), date_of(test)), silent)
    with pytest.raises(InputError, match="--test"):
        choose_split(counts, SplitSettings(horizon, date_of(valid), date_of(first + days - horizon)), silent)


def days_of(log, horizon):
    days = DayCounts.empty(int(log.day.min()), int(log.day.max()), horizon)
    days.add(log)
    return days


def log_of(dislikes, exposures):
    """A user of each day: a dislike of an own item the day after an exposure, or exposures alone; days since 1970."""
    days = [*(day for d in dislikes for day in (d - 1, d)), *exposures]
    user = np.repeat(np.arange(len(dislikes) + len(exposures)), [2] * len(dislikes) + [1] * len(exposures))
    feedback = np.array([0, DISLIKE] * len(dislikes) + [0] * len(exposures), np.uint8)
    offsets = np.searchsorted(user, np.arange(user.max() + 2)).astype(np.int64)
    item = np.arange(len(days), dtype=np.int32)
    return EventLog(offsets, item, feedback, np.array(days, np.int64) * DAY + 5, None, len(days))


def days_with_dislikes_ahead(log, horizon):
    requests = all_requests(log, horizon)
    return requests.day[requests.has_dislikes]


def sizes(days, last, horizon, valid, test):
    """User-days with a dislike ahead of train, valid and test."""
    in_valid = (valid <= days) & (days + horizon < test)
    return np.array([sum(days + horizon < valid), sum(in_valid), sum((test <= days) & (days + horizon <= last))])


@given(st.lists(st.integers(5, 35), min_size=1, max_size=40), st.integers(1, 4), st.data())
@settings(max_examples=30)
def test_the_chosen_dates_are_the_best_of_all(days, horizon, data):
    """The smallest part, measured by its share, is as large as any dates make it; also where one is given."""
    last = 39
    log = log_of(days, [0, last])
    ahead = days_with_dislikes_ahead(log, horizon)
    valids = range(horizon + 1, last - 2 * horizon)
    pairs = [(valid, test) for valid in valids for test in range(valid + horizon + 1, last - horizon + 1)]
    least = {pair: min(sizes(ahead, last, horizon, *pair) / (0.6, 0.15, 0.25)) for pair in pairs}
    given = data.draw(st.sampled_from(pairs))
    fixed = data.draw(st.sampled_from([None, 0, 1]))
    if fixed is not None:
        least = {pair: size for pair, size in least.items() if pair[fixed] == given[fixed]}
    dates = [date_of(day) if place == fixed else None for place, day in enumerate(given)]
    valid, test = choose_split(days_of(log, horizon), SplitSettings(horizon, *dates), silent)
    assert least[valid, test] == max(least.values())


def test_a_log_that_wakes_late_is_split_where_its_dislikes_are():
    """Ten years of a game's first users, then a year of the others: by calendar train would have one request."""
    rng = np.random.default_rng(0)
    log = log_of([10, *rng.integers(3300, 3650, 1000)], [0, 3650])
    valid, test = choose_split(days_of(log, 7), SplitSettings(7), silent)
    found = sizes(days_with_dislikes_ahead(log, 7), 3650, 7, valid, test)
    np.testing.assert_allclose(found / found.sum(), [0.6, 0.15, 0.25], atol=0.02)


def test_a_small_part_is_warned_of(sources, tmp_path):
    said: list[str] = []
    run(sources, tmp_path / "data", report=said.append)
    assert [line.split(" user-days")[0].rpartition(" ")[0] for line in said if line.startswith("warning")] == [
        "warning: valid has",
        "warning: test has",
    ]


@given(day=st.integers(0, 100_000))
def test_dates_and_days(day):
    assert day_of(date_of(day)) == day
    assert date_of(day) == str(np.datetime64(day, "D"))


def test_an_existing_data_set_is_replaced_only_by_force(sources, tmp_path):
    out = tmp_path / "data"
    run(sources, out)
    before = contents(out)
    with pytest.raises(InputError, match="--force replaces it"):
        run(sources, out, split=SplitSettings(5))
    assert contents(out) == before
    (out / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"thesis\.tex: is no part of the data set"):
        run(sources, out, split=SplitSettings(5), force=True)
    (out / "thesis.tex").rename(out / "events.nfs.000001")  # as an append leaves it that was killed
    assert run(sources, out, split=SplitSettings(5), force=True).horizon == 5
    assert not (out / "events.nfs.000001").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source"]


def test_an_empty_directory_may_be_filled(sources, tmp_path):
    (tmp_path / "data").mkdir()
    run(sources, tmp_path / "data").verify()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_a_failure_midway_leaves_what_was_there(sources, tmp_path, monkeypatch, error):
    old, fresh = tmp_path / "old", tmp_path / "deep" / "er" / "fresh"
    run(sources, old)
    before = contents(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(negfast.sid.build, "build_semantic_ids", fail)
    for out in (old, fresh):
        with pytest.raises(error):
            run(sources, out, force=True)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "source"]
    Dataset.open(old).verify()
