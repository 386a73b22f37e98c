"""A log of any number of files, in any order, in small blocks and little memory gives the same bits; kills, limits."""

import gzip
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from negfast.cli import main
from negfast.data.dataset import EVENTS, VALUES, Dataset
from negfast.data.log import DAY, EventLog
from negfast.data.shards import histories, open_shard
from negfast.data.split import DayCounts, all_requests, split_requests
from negfast.errors import InputError
from negfast.memory import parse_bytes
from negfast.prepare import build, reading, sorter, writing
from negfast.prepare.build import SemanticIdSettings, SplitSettings, prepare, sample_log
from negfast.prepare.events import EventMapping, ItemMapping, Selection
from negfast.prepare.reading import LogReader, log_files, read_events, read_file, scratch_sorter, sort_log
from negfast.prepare.recipes import recipe_reader
from negfast.prepare.rules import parse_rule
from negfast.prepare.samples import MOVIETWEETINGS
from negfast.prepare.writing import write_log

T0 = 1_371_000_000
MAPPING = EventMapping(dislike=(parse_rule("rating<=2"),), value="rating", time_unit="s")
OF_MOVIETWEETINGS = {  # SHA-256 of what was written when a log was sorted in memory
    EVENTS: "f61b8601495d46ed3907a371d63419315a5a04ef519a010a54a4bafb73364201",
    VALUES: "dd2ccfe13e2a99ebc5eceddee1d92a485dc64bae0061648a0932764986e3143a",
}


def silent(_):
    pass


def rows_of_log(rng, n, users=40, items=25, days=50):
    """Rows with many ties in time and some repeats, as lines of a CSV file."""
    user, item, rating = rng.integers(users, size=n), rng.integers(items, size=n), rng.integers(1, 6, size=n)
    moment = T0 + rng.integers(days, size=n) * DAY + rng.integers(3, size=n)
    rows = [f"u{u},{i},{r},{t}" for u, i, r, t in zip(user, item, rating, moment, strict=True)]
    return [*rows, *rows[: n // 20]]


def small_blocks(monkeypatch, bytes_=512, rows=17, chunk=23):
    monkeypatch.setattr("negfast.prepare.readers.BLOCK_BYTES", bytes_)
    monkeypatch.setattr("negfast.prepare.readers.BLOCK_ROWS", rows)
    monkeypatch.setattr(reading, "CHUNK_EVENTS", chunk)
    monkeypatch.setattr(sorter, "BATCH_ROWS", 2048)
    monkeypatch.setattr(writing, "SORTED_BYTES", 4096)


def write_csv(path, rows):
    text = "\n".join(["user,item,rating,time", *rows]) + "\n"
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    path.write_bytes(compress.get(path.suffix, bytes)(text.encode()))
    return path


def written(folder, paths, memory=None, drop=False, mapping=MAPPING):
    """The files of the events, their summary, and the ids."""
    folder.mkdir()
    reader = LogReader(log_files(paths), read_file(mapping), mapping, silent, Selection(), time.time())
    with scratch_sorter(folder, memory) as at_work:
        log, items = sort_log(reader, at_work)
        facts = write_log(folder, log, 7, drop_repeats=drop)
    assert sorted(path.name for path in folder.iterdir()) == [EVENTS, VALUES]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files, facts, (log.user_ids.to_pylist(), items.ids)


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "csv.zst", "parquet", "jsonl"])
def test_files_blocks_and_memory_do_not_change_a_bit(tmp_path, monkeypatch, kind):
    rng = np.random.default_rng(3)
    rows = rows_of_log(rng, 1200)
    whole = write_csv(tmp_path / "whole.csv", rows)
    expected = written(tmp_path / "expected", [whole])
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "_SUCCESS").touch()
    (parts / ".hidden.csv").touch()
    for number, some in enumerate(np.array_split(np.array(rows), 12)):  # part-10 comes after part-2
        folder = parts / f"part-{number}"
        folder.mkdir()
        path = folder / f"0.{kind}"
        cells = [row.split(",") for row in some]
        if kind == "parquet":
            user, item, rating, moment = zip(*cells, strict=True)
            numbers = {"item": item, "rating": rating, "time": moment}
            table = pa.table({"user": list(user), **{n: pa.array([int(v) for v in c]) for n, c in numbers.items()}})
            parquet.write_table(table, path)
        elif kind == "jsonl":
            path.write_text(
                "".join(f'{{"user": "{u}", "item": {i}, "rating": {r}, "time": {t}}}\n' for u, i, r, t in cells)
            )
        else:
            write_csv(path, list(some))
    small_blocks(monkeypatch)
    shuffled = [path for path in parts.iterdir() if path.is_dir()]
    rng.shuffle(shuffled)
    for number, (paths, memory) in enumerate([([parts], 600 << 20), (shuffled, None)]):
        files, facts, ids = written(tmp_path / f"found-{number}", paths, memory)
        assert files == expected[0]
        assert ids == expected[2]
        assert facts.counts() == expected[1].counts() and facts.repeats == expected[1].repeats > 0
        for column in ("active", "with_dislikes"):
            np.testing.assert_array_equal(getattr(facts.days, column), getattr(expected[1].days, column))
    files, facts, _ = written(tmp_path / "dropped", [parts], drop=True)
    assert facts.n_events == expected[1].n_events - expected[1].repeats == facts.counts()["events"]
    monkeypatch.undo()
    assert files == written(tmp_path / "dropped at once", [whole], drop=True)[0]


def test_the_embedded_log_in_pieces_has_the_bits_it_had(tmp_path, monkeypatch):
    lines = zstandard.decompress((MOVIETWEETINGS / "ratings.dat.zst").read_bytes()).splitlines(keepends=True)
    monkeypatch.setattr("negfast.prepare.readers.BLOCK_BYTES", 1 << 18)
    whole = [MOVIETWEETINGS / "ratings.dat.zst", MOVIETWEETINGS / "movies.dat.zst"]
    pieces = [tmp_path / f"ratings-{number}.dat" for number in (7, 10, 9)]
    for path, first, last in zip(pieces, (0, 60_001, 25_000), (25_000, None, 60_001), strict=True):
        path.write_bytes(b"".join(lines[first:last]))
    for number, (files, memory) in enumerate([(whole, None), ([*pieces, whole[1]], 600 << 20)]):
        out = tmp_path / f"out-{number}"
        out.mkdir()
        reader, items = recipe_reader("movietweetings", log_files(files), silent)
        with scratch_sorter(out, memory) as at_work:
            write_log(out, sort_log(reader, at_work, items)[0], 7)
        assert {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in OF_MOVIETWEETINGS} == (
            OF_MOVIETWEETINGS
        )


@pytest.mark.parametrize("kind", ["csv", "csv.zst", "parquet", "jsonl"])
@pytest.mark.parametrize("bad", [3, 150, 299])
def test_a_bad_row_of_a_later_block_is_named(tmp_path, monkeypatch, kind, bad):
    small_blocks(monkeypatch)
    path = tmp_path / f"log.{kind}"
    times = [str(T0 + i) for i in range(300)]
    times[bad] = "soon"
    if kind == "parquet":
        columns = {name: ["1"] * 300 for name in ("user", "item", "rating")}
        parquet.write_table(pa.table({**columns, "time": times}), path)
        place = f"row {bad + 1}"
    elif kind == "jsonl":
        path.write_text("".join(f'{{"user": 1, "item": 2, "rating": 3, "time": "{t}"}}\n\n' for t in times))
        place = f"line {2 * bad + 1}"
    else:
        write_csv(path, [f"1,2,3,{t}\n" for t in times])  # an empty line after each
        place = f"line {2 * bad + 2}"
    with pytest.raises(InputError, match=f"{place}: time 'soon' is no time"):
        read_events([path], MAPPING, silent)
    selection = Selection(skip_bad_rows=True)
    events, _ = read_events([path], MAPPING, silent, selection, whole=False)
    assert len(events.log) == 299 and selection.left_out == {"bad_rows": 1}


def test_a_line_of_a_later_block_with_too_few_fields_is_named(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    rows = [f"1,{i},{i % 5 + 1},{T0 + i}" for i in range(200)]
    rows[120] = "1,2"
    path = write_csv(tmp_path / "log.csv", rows)
    with pytest.raises(InputError, match="line 122: found 2 fields, expected 4"):
        read_events([path], MAPPING, silent)
    said: list[str] = []
    read_events([path], MAPPING, said.append, Selection(skip_bad_rows=True))
    assert said[1].endswith("log.csv, line 122: found 2 fields, expected 4")


def test_what_concerns_the_whole_log_is_found_in_any_block(tmp_path, monkeypatch):
    """A stray date, an item that is not known, a rule that never holds, the first item of all."""
    small_blocks(monkeypatch)
    rows = [f"1,{i % 7},{i % 5 + 1},{T0 + i * DAY // 5}" for i in range(400)]
    path = write_csv(tmp_path / "log.csv", [*rows[:300], f"1,9,3,{T0 + 900 * DAY}", *rows[300:]])
    with pytest.raises(InputError, match=r"line 302: .* is far from the other dates \(1 of 401 events are\)"):
        read_events([path], MAPPING, silent)
    kept = Selection(last_day=T0 // DAY + 950)
    known = [str(i) for i in range(7)]
    with pytest.raises(InputError, match=r"line 302: item '9' is not in the item table \(1 items of the log are not\)"):
        read_events([path], MAPPING, silent, kept, known=known)
    rule = EventMapping(dislike=(parse_rule("rating<=2"), parse_rule("rating>7")), time_unit="s")
    with pytest.raises(InputError, match=r"no event matches rating>7; rating holds 3 \(81\), 1 \(80\)"):
        read_events([path], rule, silent, kept)


def test_files_of_different_types_are_refused(tmp_path):
    for name, user in (("a", [1, 2]), ("b", ["x", "y"])):
        table = {"user": user, "item": [1, 2], "rating": [1, 5], "time": [T0, T0]}
        parquet.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, .*b\.parquet: columns of different types"):
        read_events([tmp_path], MAPPING, silent)
    write_csv(tmp_path / "b.parquet.csv", ["1,2,3,4"])
    with pytest.raises(InputError, match="found text and Parquet, expected one kind"):
        read_events([tmp_path / "a.parquet", tmp_path / "b.parquet.csv"], MAPPING, silent)


@pytest.mark.parametrize("order", ["abc", "bca", "cab"])
def test_integer_ids_may_be_floats_or_missing_in_some_files(tmp_path, order):
    """As pandas writes integers with gaps; nulls are skipped, and order is that of numbers."""
    ids = {"a": [10, 9], "b": [9.0, None, 100.0], "c": pa.array([None, 7], pa.int32())}
    for name, kind in zip(order, "abc", strict=True):
        n = len(ids[kind])
        table = {"user": ids[kind], "item": ids[kind], "rating": [1] * n, "time": [T0 + i for i in range(n)]}
        parquet.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    events, _ = read_events([tmp_path], MAPPING, silent, Selection(skip_bad_rows=True), whole=False)
    assert events.user_ids == events.item_ids == ["7", "9", "10", "100"]
    assert np.diff(events.log.user_offsets).tolist() == [1, 2, 1, 1]
    with pytest.raises(InputError, match=r"parquet, row [12]: no user, expected an id"):
        read_events([tmp_path], MAPPING, silent)
    known = ["100", "9", "10"]
    with pytest.raises(InputError, match=r"parquet, row 2: item '7' is not in the item table"):
        read_events([tmp_path], MAPPING, silent, Selection(skip_bad_rows=True), known=known, whole=False)


@pytest.mark.parametrize("kind", ["small", "large", "negative", "string"])
@pytest.mark.parametrize("known", [False, True])
def test_the_order_is_that_of_the_definition_for_ids_of_any_kind(tmp_path, kind, known):
    """By (length, text) of the user's id, by time, by arrival; in several batches."""
    rng = np.random.default_rng(3)
    spread = {"small": 1, "large": 1 << 40, "negative": -7, "string": 1}[kind]
    user, item = rng.integers(0, 40, 300_000) * spread, rng.integers(0, 12, 300_000) * spread
    if kind == "negative":
        user[user % 2 == 0] *= -1
    time = rng.integers(0, 50, len(user)) * 500_000_000
    row = np.arange(len(user))
    with sorter.LogSorter(tmp_path) as rows:
        ids = [pa.array(column) if kind != "string" else pa.array(column).cast(pa.string()) for column in (user, item)]
        table = pa.table({"user": ids[0], "item": ids[1], "time": time, "value": row.astype(np.float32)})
        for first in range(0, len(user), 70_000):
            rows.add(table.slice(first, 70_000))
        rows.end()
        user_ids, item_ids = rows.ids("user"), rows.ids("item")
        assert user_ids.to_pylist() == sorted(set(map(str, user.tolist())), key=lambda name: (len(name), name))
        if known:  # an item table of its own order, with an item that the log lacks
            item_ids = pa.array([*item_ids.to_pylist()[::-1], "no event"])
        batches = list(rows.sorted(user_ids, item_ids))
    assert len(batches) > 1
    found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    index = []
    for names, column in ((user_ids, user), (item_ids, item)):
        place = {name: number for number, name in enumerate(names.to_pylist())}
        index.append(np.array([place[str(value)] for value in column.tolist()]))
    order = np.lexsort((row, time, index[0]))
    assert found["value"].tolist() == order.tolist()
    assert found["user"].dtype == np.int32 and np.array_equal(found["user"], index[0][order])
    assert found["item"].dtype == np.int32 and np.array_equal(found["item"], index[1][order])
    assert np.array_equal(found["time"], time[order] // 1_000_000_000)


def test_a_directory_without_data_is_refused(tmp_path):
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(InputError, match=r"found no data file in the directory, expected \.parquet"):
        log_files([tmp_path])


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_day_counts_are_those_of_the_requests(data):
    n, horizon = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    draw = lambda most: np.array(data.draw(st.lists(st.integers(0, most), min_size=n, max_size=n)))  # noqa: E731
    user, day = draw(4), draw(12)
    order = np.lexsort((day, user))
    offsets = np.searchsorted(user[order], np.arange(6)).astype(np.int64)
    feedback, item = draw(3).astype(np.uint8), draw(3).astype(np.int32)
    log = EventLog(offsets, item, feedback, (day[order] + 100).astype(np.int64) * DAY, None, 4)
    days = DayCounts.empty(int(log.day.min()), int(log.day.max()), horizon)
    cut = data.draw(st.integers(0, 5))
    for first, last in ((0, cut), (cut, 5)):
        some = slice(offsets[first], offsets[last])
        part = EventLog(offsets[first : last + 1] - offsets[first], item[some], feedback[some], log.time[some], None, 4)
        if len(part):
            days.add(part)
    requests = all_requests(log, horizon)
    size = len(days.active)
    np.testing.assert_array_equal(days.active, np.bincount(requests.day - days.first, minlength=size))
    ahead = requests.day[requests.has_dislikes] - days.first
    np.testing.assert_array_equal(days.with_dislikes, np.bincount(ahead, minlength=size))
    try:
        split = split_requests(log, horizon, 105, 108)
    except InputError as error:
        with pytest.raises(InputError) as found:
            days.parts(105, 108)
        assert str(found.value) == str(error)
        return
    parts = {"train": split.train, "valid": split.valid, "test": split.test}
    assert days.parts(105, 108) == {n: (len(part), int(part.has_dislikes.sum())) for n, part in parts.items()}


def test_values_are_the_file_that_safetensors_writes(tmp_path):
    rows = rows_of_log(np.random.default_rng(1), 101)
    files, facts, _ = written(tmp_path / "out", [write_csv(tmp_path / "log.csv", rows)])
    events, _ = read_events([tmp_path / "log.csv"], MAPPING, silent)
    assert events.log.value is not None
    save_file({"value": events.log.value}, tmp_path / "expected")
    assert files[VALUES] == (tmp_path / "expected").read_bytes()
    counted = DayCounts.empty(facts.days.first, facts.days.last, 7)
    for _, log in histories(open_shard(tmp_path / "out" / EVENTS), users_at_once=3):
        counted.add(log)
    np.testing.assert_array_equal(counted.with_dislikes, facts.days.with_dislikes)


def test_a_sample_has_whole_histories_within_the_limit(tmp_path, monkeypatch):
    written(tmp_path / "out", [write_csv(tmp_path / "log.csv", rows_of_log(np.random.default_rng(5), 900))])
    shard = open_shard(tmp_path / "out" / EVENTS)
    everything = sample_log(shard, 0, silent)
    assert len(everything) == shard.n_events
    monkeypatch.setattr(build, "SAMPLED_EVENTS", 300)
    some, again, other = (sample_log(shard, seed, silent) for seed in (0, 0, 1))
    assert 200 < len(some) <= 300 and some.n_users < 40
    np.testing.assert_array_equal(some.item, again.item)
    assert some.n_users != other.n_users or not np.array_equal(some.item, other.item)
    histories = lambda log: {tuple(part) for part in np.split(log.time, log.user_offsets[1:-1])}  # noqa: E731
    assert histories(some) <= histories(everything)
    monkeypatch.setattr(build, "SAMPLED_USERS", 5)
    assert sample_log(shard, 0, silent).n_users <= 5


@pytest.mark.parametrize(
    ("size", "expected"), [("4GB", 4 * 10**9), ("1.5 GiB", 3 << 29), ("800mb", 8 * 10**8), ("2TiB", 2 << 40)]
)
def test_sizes(size, expected):
    assert parse_bytes("--memory", size) == expected


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("4", "--memory '4': expected a size like 4GB"),
        ("-4GB", "--memory '-4GB': expected a size like 4GB"),
        ("200MB", "--memory 0.20GB: preparing any log needs at least 1.60GB"),
        ("4000TB", "this machine has"),
    ],
)
def test_a_memory_that_cannot_be_kept_is_refused_before_work_starts(tmp_path, size, said):
    out = tmp_path / "out"
    command = ["prepare", str(tmp_path / "gone.csv"), "--dislike", "rating<=2", f"--memory={size}", "--out", str(out)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_catalogue_that_needs_more_is_refused_with_the_number(tmp_path):
    table = tmp_path / "items.csv"
    table.write_text("\n".join(["item", *map(str, range(1_000_000))]))
    with pytest.raises(InputError, match=r"1,000,000 items and 0 users need at least 3\.35GB"):
        prepare(
            [tmp_path / "gone.csv"], table, tmp_path / "out", mapping=MAPPING, item_mapping=ItemMapping(),
            split=SplitSettings(), semantic_ids=SemanticIdSettings(), memory=2 * 10**9, report=silent,
        )  # fmt: skip


STAGES = {
    "reading": (reading.LogReader, "_keep"),
    "sorting": (writing.LogSummary, "add"),
    "shard": (writing, "_copy_values"),
    "semantic IDs": (build, "sample_log"),
    "manifest": (build, "finish_dataset"),
}


def make(log: Path, out: Path) -> Dataset:
    sids = SemanticIdSettings(2, 8, encoder="tfidf", quantizer="random")
    return prepare(
        [log], None, out, mapping=MAPPING, item_mapping=ItemMapping(), split=SplitSettings(3), semantic_ids=sids,
        force=True, report=silent,
    )  # fmt: skip


def make_and_die(log: Path, out: Path, stage: str) -> None:
    """Run by a process of its own: a fork would have DuckDB's locks without its threads."""
    owner, name = STAGES[stage]
    setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    make(log, out)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("there", [False, True])
def test_a_kill_leaves_nothing_or_what_was_there(tmp_path, stage, there):
    log = write_csv(tmp_path / "log.csv", rows_of_log(np.random.default_rng(9), 2000))
    out = tmp_path / "out"
    before = make(log, out).fingerprint if there else None
    call = f"from {__name__} import make_and_die, Path; make_and_die(Path({str(log)!r}), Path({str(out)!r}), {stage!r})"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", call], env=os.environ | {"PYTHONPATH": root}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    visible = sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".")
    assert visible == ["log.csv", *(["out"] if there else [])]
    if there:
        Dataset.open(out).verify()
        assert Dataset.open(out).fingerprint == before
    assert make(log, out).fingerprint == (before or Dataset.open(out).fingerprint)
