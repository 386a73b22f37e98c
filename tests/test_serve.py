"""What serving promises beside the main job: resuming, abstaining, what a score means, and what it refuses."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet
import pytest

from negfast.config import load_config
from negfast.data.dataset import ITEMS, Dataset, date_of
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.files import locked
from negfast.prepare import readers
from negfast.runtime import generation
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.verdict import Candidates, candidate_logits, shown_candidates
from negfast.serve import predict, tables
from negfast.serve.context import context_day, report_context_moment
from negfast.serve.ids import column_of, index_of
from negfast.serve.parts import Part, write_in_parts
from negfast.serve.profiles import Profiles, category_matrix, feedback_matrices
from negfast.serve.run import Run
from negfast.serve.score import FirstKnown
from negfast.sid.trie import SeenNodes
from tests.tiny import prepare_log, run_cli, train_arguments, write_log

SCHEMA = pa.schema([("n", pa.int64())])


def rows(start: int, stop: int) -> pa.Table:
    return pa.table({"n": list(range(start, stop))}, schema=SCHEMA)


class Killed(BaseException):
    pass


def test_parts_go_on_where_they_were_killed(tmp_path):
    out, asked = tmp_path / "out.parquet", []

    def make(start: int, stop: int, until: int = 10**9) -> pa.Table:
        if start >= until:
            raise Killed
        asked.append(start)
        return rows(start, stop)

    with pytest.raises(Killed):
        write_in_parts(out, SCHEMA, {"a": 1}, 25, 10, lambda a, b: make(a, b, until=20), ("x", "rows"), Part())
    assert not out.exists()
    write_in_parts(out, SCHEMA, {"a": 1}, 25, 10, make, ("x", "rows"), Part())
    assert asked == [0, 10, 20]  # nothing twice
    assert parquet.read_table(out)["n"].to_pylist() == list(range(25))
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_parts_of_another_question_are_not_used(tmp_path):
    out = tmp_path / "out.parquet"

    def dies(start: int, stop: int) -> pa.Table:
        if start:
            raise Killed
        return rows(100, 100 + stop - start)

    with pytest.raises(Killed):
        write_in_parts(out, SCHEMA, {"at": "Monday"}, 20, 10, dies, ("x", "rows"), Part())
    write_in_parts(out, SCHEMA, {"at": "Tuesday"}, 20, 10, rows, ("x", "rows"), Part())
    assert parquet.read_table(out)["n"].to_pylist() == list(range(20))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "USERS_AT_ONCE", 32)
    monkeypatch.setattr(tables, "PAIRS_AT_ONCE", 50)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 70)  # batches and blocks end in different places
    monkeypatch.setattr(readers, "BLOCK_BYTES", 700)


@pytest.mark.parametrize("command", ["score", "score csv", "predict", "user-profiles"])
def test_parts_join_to_the_whole_file(tiny_run, tmp_path, small_batches, command):
    """To the byte, as docs/serving.md joins them."""
    data, rng = Dataset.open(RunFolder(tiny_run).data), np.random.default_rng(0)
    users, items = (np.array(ids)[rng.integers(0, len(ids), 333)] for ids in (data.user_ids, data.items.ids))
    pairs = pa.table({"user": users, "item": items, "n": range(333)})
    parquet.write_table(pairs, tmp_path / "pairs.parquet")
    csv.write_csv(pairs, tmp_path / "pairs.csv")
    asked = {
        "score": ["score", str(tiny_run), str(tmp_path / "pairs.parquet")],
        "score csv": ["score", str(tiny_run), str(tmp_path / "pairs.csv")],
        "predict": ["predict", str(tiny_run), "--top", "5"],
        "user-profiles": ["user-profiles", str(tiny_run), "--attribute", "genre"],
    }[command]
    run_cli(*asked, "--out", str(tmp_path / "whole.parquet"))
    parts = []
    for number in (1, 2, 3):
        parts.append(tmp_path / f"part-{number}.parquet")
        run_cli(*asked, "--part", f"{number}/3", "--out", str(parts[-1]))
    files = [parquet.ParquetFile(part) for part in parts]
    assert all(file.num_row_groups for file in files)
    with parquet.ParquetWriter(tmp_path / "joined.parquet", files[0].schema_arrow, compression="zstd") as out:
        for file in files:
            for group in range(file.num_row_groups):
                out.write_table(file.read_row_group(group))
    assert (tmp_path / "joined.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    if command.startswith("score"):
        assert parquet.read_table(tmp_path / "whole.parquet")["n"].cast(pa.int64()).to_pylist() == list(range(333))


def test_a_part_is_one_of_some(tiny_run, tmp_path):
    assert [list(Part(number, 3).take(range(0, 50, 10))) for number in (1, 2, 3)] == [[0], [10, 20], [30, 40]]
    assert [list(Part(number, 3).take(range(0, 10, 10))) for number in (1, 2, 3)] == [[], [], [0]]
    for text in ("0/2", "3/2", "2", "a/b", "-1/2", "1/"):
        said = one_line(run_cli("predict", str(tiny_run), "--part", text, "--out", str(tmp_path / "x.csv"), code=2))
        assert f"--part: found '{text}', expected I/N" in said


def test_a_killed_score_goes_on(tiny_run, tmp_path, small_batches, monkeypatch):
    data = Dataset.open(RunFolder(tiny_run).data)
    pairs, out = tmp_path / "pairs.csv", tmp_path / "x.csv"
    asked: list[str] = []
    csv.write_csv(pa.table({"user": data.user_ids * 2, "item": (data.items.ids * 3)[:240]}), pairs)
    score = Run.score

    def dies(self, users, items, *rest, until=3):
        if len(asked) == until:
            raise Killed
        asked.append(users[0].as_py())
        return score(self, users, items, *rest)

    monkeypatch.setattr(Run, "score", dies)
    with pytest.raises(Killed):
        tables.score_run(tiny_run, pairs, None, None, out)
    assert not out.exists()
    monkeypatch.setattr(Run, "score", lambda *arguments: dies(*arguments, until=-1))
    tables.score_run(tiny_run, pairs, None, None, out)
    assert asked == [data.user_ids[start % 120] for start in range(0, 240, 50)]  # nothing twice
    assert csv.read_csv(out)["user"].to_pylist() == data.user_ids * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.csv", "x.csv"]


def test_a_bad_row_is_found_before_the_first_score(tiny_run, tmp_path, small_batches):
    """Wherever it is, and it is named by its row."""
    out = tmp_path / "out" / "x.parquet"
    parquet.write_table(
        pa.table({"user": ["u1"] * 200, "item": [1.0] * 177 + [1.5] + [1.0] * 22}), tmp_path / "p.parquet"
    )
    (tmp_path / "p.csv").write_text("user,item\n" + "u1,i1\n" * 150 + "u1,i1,more\n" + "u1,i1\n" * 9)
    for name, said in (("p.parquet", "row 178: item 1.5 is no id"), ("p.csv", "line 152: found 3 fields, expected 2")):
        message = one_line(run_cli("score", str(tiny_run), str(tmp_path / name), "--out", str(out), code=2))
        assert f"{tmp_path / name}, {said}" in message
    assert not out.parent.exists()


def test_predict_in_batches_is_predict_at_once(tiny_run, tmp_path, monkeypatch):
    run_cli("predict", str(tiny_run), "--top", "5", "--out", str(tmp_path / "once.parquet"))
    monkeypatch.setattr(tables, "USERS_AT_ONCE", 50)
    run_cli("predict", str(tiny_run), "--top", "5", "--out", str(tmp_path / "parts.parquet"))
    once, parts = (parquet.read_table(tmp_path / f"{name}.parquet") for name in ("once", "parts"))
    assert parquet.ParquetFile(tmp_path / "parts.parquet").num_row_groups == 3  # of 120 users
    assert once.drop(["score"]).equals(parts.drop(["score"]))
    assert np.allclose(once["score"].to_numpy(), parts["score"].to_numpy(), rtol=1e-4)


def test_a_time_with_a_zone_is_a_day_of_utc():
    """Nothing after the moment is looked at, wherever the caller's clock hangs."""
    day = 86_400
    log = EventLog(np.array([0, 2]), np.array([0, 1]), np.array([LIKE, LIKE]), np.array([0, 30 * day]), None, 2)
    for at, last in (("1970-01-11", 9), ("1970-01-11T12:00", 9), ("1970-01-11T01:00+05:00", 8)):
        assert context_day(log, at) == last


def test_score_looks_from_a_second_in_event_context(capsys):
    run: Any
    log = EventLog(np.array([0, 2]), np.array([0, 1]), np.array([LIKE, LIKE]), np.array([10, 30 * DAY + 5]), None, 2)
    for context, at, moment, said in (
        ("event", "1970-01-11T01:00+05:00", 9 * DAY + 20 * 3600, "events before 1970-01-10T20:00:00"),
        ("event", "1970-01-01T00:00:11", 11, "events before 1970-01-01T00:00:11"),
        ("event", None, 31 * DAY, "up to the end of 1970-01-31"),
        ("event", "1999-01-01", 31 * DAY, "events before 1970-02-01T00:00:00"),
        ("day", "1970-01-11T12:00", 10 * DAY, "up to the end of 1970-01-10"),
    ):
        run = SimpleNamespace(config=load_config(overrides=[f"history.context={context}"]), learned_until=0)
        assert report_context_moment(run, log, at) == moment
        assert said in capsys.readouterr().err
    run = SimpleNamespace(config=load_config(overrides=["history.context=event"]), learned_until=0)
    with pytest.raises(InputError, match="after the log's first event"):
        report_context_moment(run, log, "1970-01-01T00:00:10")


def test_answers_of_a_run_that_knows_later_days_say_so(tiny_run, tmp_path):
    learned = date_of(RunFolder(tiny_run).learned_until)
    out = ["--top", "2", "--out", str(tmp_path / "x.parquet")]
    assert "learned from events" not in run_cli("predict", str(tiny_run), "--at", learned, *out)
    day_before = date_of(RunFolder(tiny_run).learned_until - 1)
    said = run_cli("predict", str(tiny_run), "--at", day_before, *out)
    assert f"note: {tiny_run} learned from events before {learned}, so its scores know of them" in said


def test_knows():
    log = EventLog(  # user 0: an exposure to item 0 on day 1, a like of item 1 on day 3; user 1: nothing before day 5
        np.array([0, 2, 3]), np.array([0, 1, 2]), np.array([EXPOSED, LIKE, DISLIKE], np.uint8),
        np.array([1, 3, 5]) * 86_400, None, 4,
    )  # fmt: skip
    user, item = np.array([0, 1, 1, 1, -1, 0]), np.array([3, 0, 1, 2, 1, -1])
    known = FirstKnown(log)
    assert known.before(user, item, 4 * DAY).tolist() == [True, False, True, False, False, False]
    assert known.before(user, item, 2 * DAY).tolist() == [True, False, False, False, False, False]
    assert known.before(user, item, DAY).tolist() == [False] * 6


def test_ids_are_those_that_prepare_reads():
    """pandas turns integers with gaps into floats, and Arrow would write 1e+10 for a large one."""
    known = {"7": 0, "10000000000": 1}
    assert index_of(column_of("user", [1e10, None, 7.0, 8.0]), "user", known).tolist() == [1, -1, 0, -1]
    with pytest.raises(InputError, match=r"^items, row 1: item 7\.5 is no id"):
        index_of(column_of("item", [7.5, 7.0]), "item", known)


def test_score_abstains_where_nothing_is_known(tiny_run, tmp_path):
    data = Dataset.open(RunFolder(tiny_run).data)
    user, item = data.user_ids[3], data.items.ids[4]
    asked, out = tmp_path / "asked.parquet", tmp_path / "scored.parquet"
    parquet.write_table(pa.table({"user": [user, "nobody", user], "item": [item, item, "nothing"]}), asked)
    said = run_cli("score", str(tiny_run), str(asked), "--out", str(out))
    scored = parquet.read_table(out)
    assert scored.column_names == ["user", "item", "score", "abstain"]
    assert scored["abstain"].to_pylist() == [False, True, True] and scored["score"].is_null().to_pylist() == [
        False,
        True,
        True,
    ]
    assert "abstained: 2 of 3 pairs" in said
    parquet.write_table(pa.table({"user": [[user]], "item": [item]}), asked)
    message = run_cli("score", str(tiny_run), str(asked), "--out", str(out), code=2)
    assert "column 'user' is a list" in message and "expected a string or number" in message
    parquet.write_table(pa.table({"user": ["nobody"], "item": [item]}), asked)
    assert "no user is known, the first is 'nobody'" in run_cli(
        "score", str(tiny_run), str(asked), "--out", str(out), code=2
    )


def test_matrices_of_history():
    names, matrix = category_matrix([("b", "a"), (), ("a", "a")])
    assert names == ["a", "b"] and matrix.toarray().tolist() == [[1, 1], [0, 0], [1, 0]]
    log = EventLog(  # a dislike that became a like; an exposure takes nothing back; one after the day
        np.array([0, 4]), np.array([0, 0, 1, 1]), np.array([DISLIKE, LIKE, DISLIKE, EXPOSED], np.uint8),
        np.array([1, 2, 3, 4]) * 86_400, None, 2,
    )  # fmt: skip
    bad, good = feedback_matrices(log, 4)
    assert bad.toarray().tolist() == [[0, 1]] and good.toarray().tolist() == [[1, 0]]
    bad, good = feedback_matrices(log, 1)
    assert bad.toarray().tolist() == [[1, 0]] and good.toarray().tolist() == [[0, 0]]
    bad, good = feedback_matrices(replace(log, feedback=np.zeros(4, np.uint8)), 4)
    assert bad.nnz == good.nnz == 0


def test_profiles_count_what_the_log_holds(tiny_run, tmp_path):
    out = tmp_path / "profiles.parquet"
    run_cli("user-profiles", str(tiny_run), "--attribute", "genre", "--out", str(out))
    data = Dataset.open(RunFolder(tiny_run).data)
    found = {(row["user"], row["category"]): row for row in parquet.read_table(out).to_pylist()}
    log, genre = data.log, [values[0] for values in data.items.attributes["genre"]]
    bad: dict[tuple[str, str], int] = {}
    good: dict[tuple[str, str], int] = {}
    for u, i, f in zip(log.user.tolist(), log.item.tolist(), log.feedback.tolist(), strict=True):  # no pair twice
        counts = bad if f == DISLIKE else good
        counts[data.user_ids[u], genre[i]] = counts.get((data.user_ids[u], genre[i]), 0) + 1
    for key in bad.keys() | good.keys():
        assert (found[key]["dislikes"], found[key]["likes"]) == (bad.get(key, 0), good.get(key, 0))
        row, n = found[key], bad.get(key, 0) + good.get(key, 0)
        assert 0 < row["lift_low"] < row["lift"] < row["lift_high"]
        assert row["lift"] == pytest.approx(row["dislike_rate"] / (row["expected"] / n), rel=1e-5)
    assert sum(row["expected"] for row in found.values() if row["likes"] + row["dislikes"]) == pytest.approx(
        sum(bad.values()), rel=1e-5
    )
    everyone = sum(bad.values()) / (sum(bad.values()) + sum(good.values()))
    for key in found.keys() - (bad.keys() | good.keys()):  # nothing but the expected share is known
        row = found[key]
        assert row["items"] == "[]" and np.isnan(row["expected"]) and row["lift"] == pytest.approx(1, rel=1e-6)
        assert row["dislike_rate"] == pytest.approx(everyone, rel=1e-5)
    shares: dict[str, float] = {}
    for (name, _), row in found.items():
        shares[name] = shares.get(name, 0) + row["expected_share"]
    assert all(share == pytest.approx(1, abs=1e-4) for share in shares.values()) and len(shares) == log.n_users
    message = run_cli("user-profiles", str(tiny_run), "--attribute", "colour", "--out", str(out), code=2)
    assert "--attribute 'colour'" in message and "have genre" in message


def test_examples_of_a_profile_are_disliked_items_that_others_dislike_least(tiny_run, tmp_path):
    out = tmp_path / "profiles.parquet"
    run_cli("user-profiles", str(tiny_run), "--attribute", "genre", "--out", str(out))
    data = Dataset.open(RunFolder(tiny_run).data)
    bad, good = (matrix.toarray() for matrix in feedback_matrices(data.log, int(data.log.day.max())))
    rate = (bad.sum(0) + 5 * bad.sum() / (bad + good).sum()) / (bad.sum(0) + good.sum(0) + 5)
    genre = np.array([values[0] for values in data.items.attributes["genre"]])
    index = {name: user for user, name in enumerate(data.user_ids)}
    checked = 0
    for row in parquet.read_table(out).to_pylist():
        own = np.flatnonzero((bad[index[row["user"]]] > 0) & (genre == row["category"]))
        named = [data.items.ids.index(name) for name in json.loads(row["items"])]
        assert set(named) <= set(own) and len(named) == min(3, len(own))
        assert rate[named].tolist() == sorted(rate[own])[: len(named)]
        checked += len(own) > 3
    assert checked


def test_profiles_without_an_attribute_are_of_clusters_of_texts(tiny_run, tmp_path):
    out = tmp_path / "profiles.parquet"
    run_cli("user-profiles", str(tiny_run), "--out", str(out))
    rows = parquet.read_table(out).to_pylist()
    data = Dataset.open(RunFolder(tiny_run).data)
    assert {row["user"] for row in rows} == set(data.user_ids)
    words = {"grim", "sweet", "wild", "quiet"}  # what the titles tell genres apart by
    assert all(words & set(row["category"].partition(": ")[2].split(", ")) for row in rows)
    judged = sum(row["dislikes"] + row["likes"] for row in rows)
    assert judged == data.log.judged.sum()  # no pair twice, and every item is in one cluster


def test_profiles_before_any_feedback_know_nothing(tiny_run):
    engine = RunFolder(tiny_run).finished_engine(None)
    day = int(engine.log.day.min()) - 1
    users, ids = np.arange(3), pa.array(engine.data.user_ids, pa.string())
    table = Profiles(engine, None, day).of(users, ids)
    assert set(table["dislikes"].to_pylist()) == {0} and set(table["lift"].to_pylist()) == {1.0}


def test_taste_lists_are_unseen_and_not_what_everybody_gets(tiny_run, tmp_path):
    out = tmp_path / "lists.parquet"
    for rank in ("likely", "taste"):
        run_cli("predict", str(tiny_run), "--rank", rank, "--top", "5", "--out", str(out.with_stem(rank)))
    tables = {rank: parquet.read_table(out.with_stem(rank)) for rank in ("likely", "taste")}
    assert b"raised by what the user goes for" in tables["taste"].schema.field("score").metadata[b"description"]
    data = Dataset.open(RunFolder(tiny_run).data)
    seen = {(data.user_ids[u], data.items.ids[i]) for u, i in zip(data.log.user, data.log.item, strict=True)}
    rows = tables["taste"].to_pylist()
    assert not seen & {(row["user"], row["item"]) for row in rows}
    assert [row["rank"] for row in rows] == [*range(1, 6)] * data.log.n_users
    scores = np.array([row["score"] for row in rows]).reshape(-1, 5)
    assert (np.diff(scores) <= 0).all()
    first = [{row["item"] for row in table.to_pylist() if row["rank"] == 1} for table in tables.values()]
    assert len(first[1]) > len(first[0])


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the run with its data, to spoil."""
    shutil.copytree(RunFolder(tiny_run).data, tmp_path / "data")
    copy = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    described = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(described | {"data": "../data"}))
    return copy


@pytest.fixture
def pairs(tiny_run: Path, tmp_path: Path) -> Path:
    """A candidate list."""
    data = Dataset.open(RunFolder(tiny_run).data)
    path = tmp_path / "pairs.parquet"
    parquet.write_table(pa.table({"user": data.user_ids[:20], "item": data.items.ids[:20], "n": range(20)}), path)
    return path


@pytest.fixture(scope="module")
def shown_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a log of which four in ten events are mere exposures, each pair shown once or judged at once."""
    folder = tmp_path_factory.mktemp("shown")
    events, items = write_log(folder)
    header, *rows = events.read_text().splitlines()
    rng = np.random.default_rng(1)
    changed = []
    for row in rows:
        user, item, rating, time = row.split(",")
        changed.append(f"{user},{item},{3 if rating == '5' and rng.random() < 0.5 else rating},{time}")
    events.write_text("\n".join([header, *changed]) + "\n")
    data = prepare_log(folder, events, items, "--like-rule", "rating>=4")
    run_cli(*train_arguments(data, folder / "run"))
    return folder / "run"


def one_line(message: str) -> str:
    """The message of a command that failed, after what it told before."""
    lines = message.splitlines()
    assert sum(line.startswith("negfast: ") for line in lines) == 1 and lines[-1].startswith("negfast: ")
    return lines[-1]


# two processes


def test_a_second_writer_is_refused(tiny_run, pairs, tmp_path):
    out = tmp_path / "x.parquet"
    commands = [
        (out, "predict", tiny_run, "--out", out),
        (out, "score", tiny_run, pairs, "--out", out),
        (out, "user-profiles", tiny_run, "--attribute", "genre", "--out", out),
        (tmp_path / "export", "export", tiny_run, "--out", tmp_path / "export"),
        (tmp_path / "page.html", "report", tiny_run, "--out", tmp_path / "page.html"),
        (tiny_run, *train_arguments(RunFolder(tiny_run).data, tiny_run)),
        (tmp_path / "data", "prepare", tmp_path / "x.csv", "--dislike", "a", "--out", tmp_path / "data"),
    ]
    for written, *command in commands:
        with locked(written):
            said = one_line(run_cli(*map(str, command), code=2))
        assert said == f"negfast: {written}: is being written by process {os.getpid()}"
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]


def test_a_part_of_another_question_is_not_joined(tmp_path):
    """Also where it lies in a folder that says otherwise, as two processes at once left them."""
    out = tmp_path / "out.parquet"
    folders = []
    for at in ("Monday", "Tuesday"):

        def dies(start: int, stop: int, at: str = at) -> pa.Table:
            if start:
                raise Killed
            return rows(100, 100 + stop - start)

        with pytest.raises(Killed):
            write_in_parts(out, SCHEMA, {"at": at}, 20, 10, dies, ("x", "rows"), Part())
        folders.append(Path(shutil.copytree(tmp_path / ".out.parquet.parts", tmp_path / at)))
    shutil.copy(folders[0] / "000000000000.parquet", tmp_path / ".out.parquet.parts")
    write_in_parts(out, SCHEMA, {"at": "Tuesday"}, 20, 10, rows, ("x", "rows"), Part())
    assert parquet.read_table(out)["n"].to_pylist() == list(range(20))
    assert json.loads(parquet.read_schema(out).metadata[b"negfast"]) == {"at": "Tuesday"}


# damage


@pytest.mark.parametrize("name", ["data/users.parquet", "run/final/policy.safetensors", "data/items.parquet"])
def test_a_flipped_byte_is_refused(run, pairs, tmp_path, name):
    file, out = tmp_path / name, tmp_path / "x.parquet"
    run_cli("score", str(run), str(pairs), "--out", str(out))
    out.unlink()
    bad = bytearray(file.read_bytes())
    bad[len(bad) // 2] ^= 1
    file.write_bytes(bad)
    for command in (("predict", str(run)), ("score", str(run), str(pairs))):
        said = one_line(run_cli(*command, "--out", str(out), code=2))
        assert f"{name.split('/')[-1]}: damaged: its SHA-256 is not that of" in said
    assert not out.exists()


@pytest.mark.parametrize("name", ["run.json", "final/state.json", "config.toml"])
def test_a_damaged_description_is_one_line(run, pairs, tmp_path, name):
    file = run / name
    good = file.read_bytes()
    damaged = [good[: good.rindex(b" ")], b"\x00\xff\xfe", b"[]", b"null", b"7"]
    if name.endswith(".json"):
        damaged.append(b"")
        whole = json.loads(good)
        for key in whole.keys() - {"model", "init", "shown_calibration"}:  # which nothing that serves reads
            values: tuple[object, ...] = ("no", 70, [], {"a": 1})
            damaged += [json.dumps(whole | {key: value}).encode() for value in values]
            damaged.append(json.dumps({k: v for k, v in whole.items() if k != key}).encode())
        damaged = [text for text in damaged if b'"verdict_features": 70' not in text]  # another number is no damage
    for text in damaged:
        file.write_bytes(text)
        said = one_line(run_cli("score", str(run), str(pairs), "--out", str(tmp_path / "x.parquet"), code=2))
        assert str(run) in said or "data" in said, text
    file.write_bytes(good)
    run_cli("score", str(run), str(pairs), "--out", str(tmp_path / "x.parquet"))


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file grows above ``size`` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line(tiny_run, pairs, tmp_path):
    """And what was there before stays."""
    run_cli("export", str(tiny_run), "--out", str(tmp_path / "export"))
    run_cli("score", str(tiny_run), str(pairs), "--out", str(tmp_path / "x.parquet"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command in (
        ("export", str(tiny_run), "--out", str(tmp_path / "export")),
        ("score", str(tiny_run), str(pairs), "--out", str(tmp_path / "x.parquet")),
        ("predict", str(tiny_run), "--out", str(tmp_path / "x.parquet")),
        ("predict", str(tiny_run), "--out", str(tmp_path / "x.csv")),
    ):
        with small_disk(500):
            said = one_line(run_cli(*command, code=1))
        assert "too large" in said.lower(), said
    shutil.rmtree(tmp_path / ".x.parquet.parts")  # what a later call resumes
    shutil.rmtree(tmp_path / ".x.csv.parts")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# what is written, and where


def test_other_accounts_can_read_an_export(tiny_run, tmp_path):
    assert "Writing" not in run_cli("export", str(tiny_run), "--out", str(tmp_path / "export"))  # no bar of the library
    umask = os.umask(0o022)
    os.umask(umask)
    for path in (*(tmp_path / "export").iterdir(), *(tiny_run / "final").iterdir(), RunFolder(tiny_run).data / ITEMS):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
    about = json.loads((tmp_path / "export" / "negfast.json").read_text())
    shape = {"format", "layout", "moment", "base", "levels", "codebook", "tokens", "history"}
    assert set(about) == shape | {"prior", "beam", "calibration", "features"}


def test_csv_is_the_parquet(tiny_run, pairs, tmp_path):
    for name, command in (("lists", ("predict", str(tiny_run))), ("scores", ("score", str(tiny_run), str(pairs)))):
        for suffix in ("csv", "parquet"):
            run_cli(*command, "--out", str(tmp_path / f"{name}.{suffix}"))
        from_csv, table = csv.read_csv(tmp_path / f"{name}.csv"), parquet.read_table(tmp_path / f"{name}.parquet")
        assert from_csv.drop(["score"]).cast(table.drop(["score"]).schema).equals(table.drop(["score"]))
        np.testing.assert_allclose(from_csv["score"].to_numpy(), table["score"].to_numpy(), rtol=1e-6)


def test_candidates_may_be_csv(tiny_run, pairs, tmp_path):
    csv.write_csv(parquet.read_table(pairs), tmp_path / "pairs.csv")
    for name in ("csv", "parquet"):
        run_cli("score", str(tiny_run), str(tmp_path / f"pairs.{name}"), "--out", str(tmp_path / f"{name}.parquet"))
    from_csv, table = (parquet.read_table(tmp_path / f"{name}.parquet") for name in ("csv", "parquet"))
    assert from_csv["score"].equals(table["score"]) and from_csv["n"].to_pylist() == [str(n) for n in range(20)]


def test_an_output_is_checked_for_what_it_is(tiny_run, pairs, tmp_path):
    before = pairs.read_bytes()
    data = str(RunFolder(tiny_run).data)
    empty = tmp_path / "empty.csv"
    empty.touch()
    other = tmp_path / "other.csv"
    other.write_text("usr\n1\n")
    for command, said in (
        (("predict", str(tiny_run), "--out", "x.txt"), "x.txt: found suffix '.txt', expected .parquet or .csv"),
        (("score", str(tiny_run), str(pairs), "--out", str(pairs)), "is an input of this command"),
        (("predict", str(tiny_run), "--users", str(pairs), "--out", str(pairs)), "is an input of this command"),
        (("score", str(tiny_run), str(pairs), "--out", f"{data}/x.csv"), "lies in the data set"),
        (("predict", str(tiny_run), "--out", f"{data}/x.csv"), "lies in the data set"),
        (("user-profiles", str(tiny_run), "--attribute", "a", "--out", f"{data}/x.csv"), "lies in the data set"),
        (("report", str(tiny_run), "--out", f"{data}/x.html"), "lies in the data set"),
        (("score", str(tiny_run), str(empty), "--out", "x.csv"), "empty.csv: the file is empty"),
        (("predict", str(tiny_run), "--users", str(other), "--out", "x.csv"), "other.csv: no column 'user', found usr"),
        (("train", "--preset", "smoke", "--data", data, "--out", f"{data}/run"), "lies in the data set"),
        (("train", "--preset", "smoke", "--data", data, "--out", data), "lies in the data set"),
        (("export", str(tiny_run), "--out", f"{data}/export"), "lies in the data set"),
        (("report", str(tiny_run), "--out", "notes.md"), "found suffix '.md', expected .html"),
    ):
        assert said in one_line(run_cli(*command, code=2))
    assert pairs.read_bytes() == before and not (Path(data) / "run.json").exists()


def test_a_run_whose_data_set_was_moved_says_so(run, pairs, tmp_path):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    said = one_line(run_cli("score", str(run), str(pairs), "--out", str(tmp_path / "x.csv"), code=2))
    assert said == f"negfast: {run}: found no data set at {tmp_path}/data, which it was trained on; was one moved?"


def test_a_damaged_table_of_a_run_is_named_by_its_report(run):
    table = (run / "report.json").read_text()
    (run / "report.json").write_text(table[: len(table) // 2])
    assert f"{run}/report.json: damaged: " in one_line(run_cli("report", str(run), code=2))


def test_paths_are_checked_before_anything_loads(tiny_run, pairs, tmp_path):
    code = (
        "import sys\n"
        "from negfast.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('heavy', {'torch', 'transformers', 'numba'} & set(sys.modules), end.code)\n"
    )
    (tmp_path / "empty").mkdir()
    out, nothing, users = str(tmp_path / "x.parquet"), str(tmp_path / "none.csv"), str(pairs)
    for command, said in (
        (("score", str(tiny_run), nothing, "--out", out), "none.csv: no such file"),
        (("score", str(tmp_path / "empty"), str(pairs), "--out", out), "found no run.json"),
        (("score", str(tiny_run), str(pairs), "--data", nothing, "--out", out), "no such data set"),
        (("score", str(tiny_run), str(pairs), "--out", f"{pairs}/x.parquet"), "is not a directory"),
        (("predict", str(tiny_run), "--users", nothing, "--out", out), "none.csv: no such file"),
        (("predict", str(tiny_run), "--users", users, "--not-items", nothing, "--out", out), "none.csv: no such file"),
        (("user-profiles", str(tmp_path), "--attribute", "genre", "--out", out), "found no run.json"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
        assert "heavy set() 2" in done.stdout and said in done.stderr, done.stderr


# whom, from what, how many


def test_lists_for_some_users_from_some_items(tiny_run, tmp_path):
    data = Dataset.open(RunFolder(tiny_run).data)
    users, items, out = data.user_ids[5:9], data.items.ids[10:40], tmp_path / "x.parquet"
    csv.write_csv(pa.table({"user": [*users[::-1], "nobody", users[0]]}), tmp_path / "users.csv")
    parquet.write_table(pa.table({"item": items}), tmp_path / "items.parquet")
    csv.write_csv(pa.table({"item": items[:5]}), tmp_path / "delisted.csv")
    asked = ["predict", str(tiny_run), "--top", "90", "--out", str(out), "--users", str(tmp_path / "users.csv")]
    said = run_cli(*asked, "--items", str(tmp_path / "items.parquet"), "--not-items", str(tmp_path / "delisted.csv"))
    assert "users.csv: 1 of 6 users are not in the data set" in said
    seen = {user: set(data.log.item[data.log.user == u].tolist()) for u, user in enumerate(data.user_ids)}
    lists: dict[str, dict[str, float]] = {}
    for row in parquet.read_table(out).to_pylist():
        lists.setdefault(row["user"], {})[row["item"]] = row["score"]
    assert sorted(lists) == sorted(users)
    for user, listed in lists.items():
        unseen = {item for item in items[5:] if data.items.ids.index(item) not in seen[user]}
        assert set(listed) == unseen and sum(listed.values()) == pytest.approx(1, abs=1e-5)
    csv.write_csv(pa.table({"item": ["gone", "long ago"]}), tmp_path / "delisted.csv")  # what the log never had
    said = run_cli(*asked, "--not-items", str(tmp_path / "delisted.csv"))
    assert "delisted.csv: 2 of 2 items are not in the data set" in said
    csv.write_csv(pa.table({"item": items}), tmp_path / "delisted.csv")
    asked += ["--items", str(tmp_path / "items.parquet"), "--not-items", str(tmp_path / "delisted.csv")]
    assert "found no item to list" in one_line(run_cli(*asked, code=2))


def test_excluded_items_are_as_seen_ones(tiny_run):
    engine = RunFolder(tiny_run).finished_engine(None)
    users = np.array([3, 8], dtype=np.int32)
    days = np.full(2, int(engine.log.day.max()), dtype=np.int32)
    prior = engine.histories.build(users, (days.astype(np.int64) + 1) * DAY).prior
    assert prior is not None
    seen = prior.seen
    first, second = (set(seen.leaf[seen.request == row].tolist()) for row in (0, 1))
    assert first != second
    nothing = SeenNodes(
        [key[-1:] for key in seen.key], [count[-1:] for count in seen.count], [slot[:0] for slot in seen.slot],
        seen.leaf[:0], seen.request[:0],
    )  # fmt: skip
    for start, requests in ((nothing, 2), (seen, 2)):
        found = generation.with_seen(start, engine.trie, engine.trie.leaf_item[sorted(first | second)], requests)
        for level, counts in enumerate(engine.trie.node_counts[1:]):
            nodes = engine.trie.item_nodes[engine.trie.leaf_item[sorted(first | second)], level]
            there, under = np.unique(nodes, return_counts=True)
            assert found.key[level].tolist()[:-1] == [r * counts + n for r in range(2) for n in there.tolist()]
            assert found.count[level].tolist() == [*under.tolist(), *under.tolist(), 0]
            at = found.key[level][found.slot[level]] % counts
            assert at.tolist() == engine.trie.item_nodes[engine.trie.leaf_item[found.leaf.numpy()], level].tolist()
    same = generation.with_seen(seen, engine.trie, np.empty(0, np.int64), 2)
    for name in ("key", "count"):
        assert [t.tolist() for t in getattr(same, name)] == [t.tolist() for t in getattr(seen, name)]


def test_top_ends_with_the_catalogue(tiny_run, tmp_path, monkeypatch):
    widths = []
    search = generation.beam_search

    def noted(*arguments):
        widths.append(arguments[-2:])
        return search(*arguments)

    monkeypatch.setattr(generation, "beam_search", noted)
    run_cli("predict", str(tiny_run), "--top", "100000", "--out", str(tmp_path / "x.parquet"))
    n_items = len(Dataset.open(RunFolder(tiny_run).data).items.ids)
    assert set(widths) == {(n_items, n_items)}


def test_batches_adapt_to_memory(tiny_run, monkeypatch):
    engine = RunFolder(tiny_run).finished_engine(None)
    requests = predict.requests_at(np.arange(20, dtype=np.int32), int(engine.log.day.max()))
    sizes = []
    search = generation.beam_search

    def noted(*arguments):
        sizes.append(len(arguments[2]))
        return search(*arguments)

    monkeypatch.setattr(generation, "beam_search", noted)
    whole = generation.generate(engine, requests, 60)
    monkeypatch.setattr(generation, "SEARCH_MEMORY", 3 * 60 * engine.trie.codebook * generation.BYTES_A_CHOICE)
    parts = generation.generate(engine, requests, 60)
    assert sizes == [20, *[3] * 6, 2]
    assert np.array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-4)
    monkeypatch.setattr(generation, "BYTES_A_CHOICE", 1 << 50)
    with pytest.raises(InputError, match=r"a list of 60 items takes .* GiB, found"):
        generation.generate(engine, requests, 60)


# what a score means


def test_the_column_says_what_a_score_means(tiny_run, pairs, tmp_path):
    for command, said in (
        (("predict", str(tiny_run)), b"probability of the item as the user's next dislike"),
        (("score", str(tiny_run), str(pairs)), b"P(dislike | the user gives feedback)"),
    ):
        run_cli(*command, "--out", str(tmp_path / "x.parquet"))
        field = parquet.read_schema(tmp_path / "x.parquet").field("score")
        assert field.metadata[b"description"].startswith(said)


def test_what_was_shown():
    log = EventLog(  # user 0: 0 shown, then disliked that day; 1 shown, disliked the day after; 2 liked; 0 again
        np.array([0, 6, 8]), np.array([0, 0, 1, 2, 1, 0, 2, 2]),
        np.array([EXPOSED, DISLIKE, EXPOSED, LIKE, DISLIKE, EXPOSED, DISLIKE, EXPOSED], np.uint8),
        np.array([86_400, 86_401, 86_402, 86_403, 172_800, 172_801, 86_400, 259_200]), None, 3,
    )  # fmt: skip
    candidates, disliked = shown_candidates(log, "day", 1, 3)
    assert candidates.item.tolist() == [0, 1, 2, 2] and disliked.tolist() == [True, False, False, True]
    assert candidates.user.tolist() == [0, 0, 0, 1] and set(candidates.moment.tolist()) == {86_400}
    assert shown_candidates(log, "day", 2, 4)[1].tolist() == []  # none is first shown then


def test_probability_given_shown(shown_run, tiny_run, pairs, tmp_path):
    out = tmp_path / "x.parquet"
    said = one_line(run_cli("score", str(tiny_run), str(pairs), "--given", "shown", "--out", str(out), code=2))
    assert "its log has no exposures with dislikes among them on valid" in said
    engine = RunFolder(shown_run).finished_engine(None)
    candidates, disliked = shown_candidates(engine.log, "day", engine.split.valid_day, engine.split.test_day)
    logits = candidate_logits(engine, candidates)
    shown, feedback = RunFolder(shown_run).shown_calibration, RunFolder(shown_run).calibration
    assert shown.probability(logits).mean() == pytest.approx(disliked.mean(), rel=1e-4)  # calibrated on them
    assert feedback.probability(logits).mean() > 1.3 * disliked.mean()  # what it would be taken for
    data = engine.data
    parquet.write_table(pa.table({"user": data.user_ids[:9], "item": data.items.ids[:9]}), pairs)
    tables = {}
    for given in ("feedback", "shown"):
        run_cli("score", str(shown_run), str(pairs), "--given", given, "--out", str(out))
        tables[given] = parquet.read_table(out)
    logit = np.log(tables["feedback"]["score"].to_numpy() / (1 - tables["feedback"]["score"].to_numpy()))
    expected = shown.probability((logit - feedback.intercept) / feedback.slope)
    np.testing.assert_allclose(tables["shown"]["score"].to_numpy(), expected, rtol=1e-9)
    assert tables["shown"].schema.field("score").metadata[b"description"].startswith(b"P(dislike | shown)")


# start-up


def test_serving_gives_the_bits_of_transformers(tiny_run):
    """Serving runs a Qwen3 of its own, whose imports are short."""
    serving, stock = RunFolder(tiny_run).finished_engine(None, serving=True), RunFolder(tiny_run).finished_engine(None)
    assert type(serving.policy.decoder).__module__ == "negfast.model.qwen3"
    assert type(stock.policy.decoder).__module__.startswith("transformers.")
    day = int(stock.log.day.max())
    users = np.repeat(np.arange(30), 20)
    candidates = Candidates(users, np.tile(np.arange(20) * 4, 30), np.full(600, (day + 1) * DAY))
    assert np.array_equal(candidate_logits(serving, candidates), candidate_logits(stock, candidates))
    requests = predict.requests_at(np.arange(100, dtype=np.int32), day)
    for one, other in zip(*(generation.generate(e, requests, 20) for e in (serving, stock)), strict=True):
        assert np.array_equal(one, other)


def test_score_imports_what_it_needs(tiny_run, pairs, tmp_path):
    code = (
        "import sys\n"
        "from negfast.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('code', end.code, sorted(HEAVY & set(sys.modules)))\n"
    )
    heavy = {"transformers", "numba", "sklearn", "faiss", "sympy", "torch._dynamo", "torch.distributed.tensor", "scipy"}
    command = ["score", str(tiny_run), str(pairs), "--out", str(tmp_path / "x.parquet")]
    code = f"HEAVY = {heavy}\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert done.stdout == "code 0 []\n", done.stdout + done.stderr
