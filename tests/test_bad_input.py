"""Bad input through the command line: one line that names the place, exit code 2, nothing left behind."""

import errno
import json
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner
from safetensors import SafetensorError

from negfast.cli import main

T0, DAY = 1_371_000_000, 86_400
HEADER = "user,item,rating,time"


@pytest.fixture
def folder(tmp_path):
    """A folder with a good event log and a good item table to spoil."""
    rng = np.random.default_rng()
    rows = [f"{user},{day // 2},{rng.integers(1, 11)},{T0 + day * DAY}" for day in range(60) for user in range(6)]
    (tmp_path / "log.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{item},Title {item}\n" for item in range(30)))
    return tmp_path


def refused(folder, *arguments, out="out", dislike="rating<=5"):
    """Runs `negfast prepare` and returns its message, after checking code, form and traces."""
    before = sorted(folder.rglob("*"))
    options = ["--dislike", dislike, "--out", str(folder / out)]
    result = CliRunner().invoke(main, ["prepare", *map(str, arguments), *options])
    assert result.exit_code == 2, (result.output, result.exception)
    assert sorted(folder.rglob("*")) == before
    message = result.stderr.removesuffix("\n")
    assert message.startswith("negfast: ")
    assert "\n" not in message
    return message


def spoil(path, line, text):
    """Replaces a line (from 1)."""
    lines = path.read_text().split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines))


def test_missing_file(folder):
    assert "none.csv: no such file" in refused(folder, folder / "none.csv")
    message = refused(folder, folder / "log.csv", "--items", folder / "none.parquet")
    assert "none.parquet: no such file" in message


def test_missing_column(folder):
    message = refused(folder, folder / "log.csv", "--user-column", "usr")
    assert "log.csv: no column 'usr', found user, item, rating, time (did you mean 'user'?)" in message
    message = refused(folder, folder / "log.csv", "--items", folder / "items.csv", "--item-text-column", "name")
    assert "items.csv: no column 'name', found item, title" in message


def test_missing_column_of_parquet(folder):
    parquet.write_table(pa.table({"user": [1], "item": [1], "time": [T0]}), folder / "log.parquet")
    assert "log.parquet: no column 'rating', found user, item, time" in refused(folder, folder / "log.parquet")


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"PAR1\x15\x04", "Parquet; name it .parquet"), (b"\x1f\x8b\x08\x00", "gzip; name it .gz"),
     (b"\x28\xb5\x2f\xfd\x00", "zstd; name it .zst"), (b"PK\x03\x04 sheet", "spreadsheet"),
     ("user,item".encode("utf-16"), "UTF-16")],
)  # fmt: skip
def test_a_file_that_is_not_what_its_name_says(folder, content, name):
    (folder / "log.csv").write_bytes(content)
    assert name in refused(folder, folder / "log.csv")
    assert name in refused(folder, folder / "log.csv", "--items", folder / "items.csv")


def test_another_separator(folder):
    (folder / "log.csv").write_text((folder / "log.csv").read_text().replace(",", ";"))
    assert "is the separator ';'?" in refused(folder, folder / "log.csv")


def test_a_file_without_header(folder):
    (folder / "ratings.dat").write_text(f"1::2::3::{T0}\n")
    assert "--columns" in refused(folder, folder / "ratings.dat")


@pytest.mark.parametrize("row", ["1,2,3", "1,2,3,4,5"])
def test_wrong_number_of_fields(folder, row):
    spoil(folder / "log.csv", 17, row)
    assert f"log.csv, line 17: found {row.count(',') + 1} fields, expected 4" in refused(folder, folder / "log.csv")


@pytest.mark.parametrize("when", ["soon", "12:30", "nan", "1371000000x"])
@pytest.mark.parametrize("unit", ["auto", "s"])
def test_non_numeric_time(folder, when, unit):
    spoil(folder / "log.csv", 5, f"1,2,3,{when}")
    message = refused(folder, folder / "log.csv", "--time-unit", unit)
    assert f"log.csv, line 5: time '{when}' is no time, expected" in message


def test_missing_time(folder):
    spoil(folder / "log.csv", 5, "1,2,3,")
    assert "log.csv, line 5: time '' is no time" in refused(folder, folder / "log.csv")
    parquet.write_table(
        pa.table({"user": [1, 1], "item": [1, 1], "rating": [1, 1], "time": [T0, None]}), folder / "log.parquet"
    )
    assert "log.parquet, row 2: no time" in refused(folder, folder / "log.parquet")


def test_iso_time_that_is_none(folder):
    (folder / "log.csv").write_text(f"{HEADER}\n1,2,3,2013-06-17\n1,2,3,2013-06-31\n")
    assert "log.csv, line 3: time '2013-06-31' is no time" in refused(folder, folder / "log.csv")


def test_negative_time(folder):
    spoil(folder / "log.csv", 3, "1,2,3,-5")
    assert "log.csv, line 3: time -5 lies before 1970" in refused(folder, folder / "log.csv")


@pytest.mark.parametrize("future", [int(time.time()) + 3 * DAY, 9 * 10**18, 10**30])
def test_future_time(folder, future):
    spoil(folder / "log.csv", 3, f"1,2,3,{future}")
    message = refused(folder, folder / "log.csv", "--time-unit", "s")
    assert f"log.csv, line 3: time {future} lies in the future" in message


def test_wrong_unit_shows_as_future(folder):
    (folder / "log.csv").write_text(f"{HEADER}\n1,2,3,{T0 * 1000}\n")
    assert "--time-unit" in refused(folder, folder / "log.csv", "--time-unit", "s")


def test_empty_log(folder):
    (folder / "log.csv").write_text("")
    assert "log.csv: the file is empty" in refused(folder, folder / "log.csv")
    (folder / "log.csv").write_text(HEADER + "\n")
    assert "log.csv: no events" in refused(folder, folder / "log.csv")


def test_log_without_dislikes(folder):
    log = (folder / "log.csv").read_text().split("\n")
    (folder / "log.csv").write_text(
        "\n".join([log[0], *(",".join([*line.split(",")[:2], "9", line.split(",")[3]]) for line in log[1:-1])])
    )
    message = refused(folder, folder / "log.csv")
    assert "log.csv: no event matches rating<=5; rating holds 9 (360)" in message


def test_rating_that_is_no_number(folder):
    spoil(folder / "log.csv", 9, f"1,2,good,{T0}")
    assert "log.csv, line 9: rule rating<=5: rating 'good' is not a number" in refused(folder, folder / "log.csv")


def test_missing_ids(folder):
    spoil(folder / "log.csv", 4, f"1,,3,{T0}")
    assert "log.csv, line 4: no item, expected an id" in refused(folder, folder / "log.csv")


def test_duplicate_items(folder):
    (folder / "items.csv").write_text("item,title\n1,One\n2,Two\n3,Three\n2,Again\n")
    message = refused(folder, folder / "log.csv", "--items", folder / "items.csv")
    assert "items.csv, line 5: item '2' is there twice, first in" in message
    assert message.endswith("items.csv, line 3")


def test_an_item_table_of_other_items(folder):
    (folder / "items.csv").write_text("item,title\n" + "".join(f"B{item},Title {item}\n" for item in range(30)))
    message = refused(folder, folder / "log.csv", "--items", folder / "items.csv")
    assert "log.csv, line 2: item '0' is not in the item table, nor is any other item of the log" in message
    assert message.endswith("the table holds B0, B1, B2, ...")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_parquet(folder, share):
    table = pa.table({"user": [1] * 500, "item": range(500), "rating": [1] * 500, "time": [T0] * 500})
    parquet.write_table(table, folder / "log.parquet")
    data = (folder / "log.parquet").read_bytes()
    (folder / "log.parquet").write_bytes(data[: int(len(data) * share)])
    assert "log.parquet: cannot be read as Parquet" in refused(folder, folder / "log.parquet")


def test_more_names_than_int64_holds(folder):
    message = refused(folder, folder / "log.csv", "--levels", "8")
    assert "semantic IDs: 8 levels of 256 codes are more than 2^62 names" in message


def test_times_of_two_units(folder):
    """Half in seconds, half in ms: taken as ms, the seconds would all be of January 1970."""
    header, *rows = (folder / "log.csv").read_text().split()
    rows = [row + "000" if number % 2 else row for number, row in enumerate(rows)]
    (folder / "log.csv").write_text("\n".join([header, *rows]) + "\n")
    result = CliRunner().invoke(main, ["prepare", str(folder / "log.csv"), "--dislike", "rating<=5", "--out", "out"])
    assert result.exit_code == 2
    assert f"log.csv, line 2: time {T0} is s by its magnitude, most are ms" in result.stderr


def test_damaged_compression(folder):
    import zstandard

    data = zstandard.compress((folder / "log.csv").read_bytes())
    (folder / "log.csv.zst").write_bytes(data[: len(data) // 2])
    assert "log.csv.zst: cannot be read" in refused(folder, folder / "log.csv.zst")
    (folder / "log.csv.gz").write_bytes(b"not gzip")
    assert "log.csv.gz: cannot be read" in refused(folder, folder / "log.csv.gz")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_wrong_encoding_of_items(folder, encoding):
    (folder / "items.csv").write_bytes("item,title\n1,One\n2,Fantômas\n3,Three\n".encode(encoding))
    message = refused(folder, folder / "log.csv", "--items", folder / "items.csv", "--item-text-column", "title")
    assert {"latin-1": "items.csv, line 3: not UTF-8", "utf-16": "items.csv: found UTF-16"}[encoding] in message


@pytest.mark.parametrize("kind", ["dat", "jsonl", "tsv"])
def test_wrong_encoding_of_events(folder, kind):
    good, bad = f"1::2::3::{T0}\n", f"ô::2::3::{T0}\n"
    text, options = good + bad, ["--columns", "user,item,rating,time"]
    if kind == "tsv":
        text = text.replace("::", "\t")
    if kind == "jsonl":
        rows = [f'{{"user": "{user}", "item": "2", "rating": 1, "time": {T0}}}\n' for user in "1ô"]
        text, options = "".join(rows), []
    (folder / f"log.{kind}").write_bytes(text.encode("latin-1"))
    assert f"log.{kind}, line 2: not UTF-8: byte 0xf4" in refused(folder, folder / f"log.{kind}", *options)


def test_broken_json(folder):
    (folder / "log.jsonl").write_text('{"user": 1, "item": 2, "rating": 1, "time": 3}\n{"user": 1, "item"\n')
    assert "log.jsonl, line 2: not a JSON object" in refused(folder, folder / "log.jsonl")
    (folder / "log.jsonl").write_text("[1, 2]\n")
    assert "log.jsonl, line 1: not a JSON object" in refused(folder, folder / "log.jsonl")


def test_columns_that_hold_no_plain_values(folder):
    rows = [{"user": [1], "item": "a", "rating": 3, "time": T0}, {"user": [2], "item": "b", "rating": 7, "time": T0}]
    (folder / "nested.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert "column 'user' is a list<item: int64>, expected a string or number" in refused(
        folder, folder / "nested.jsonl"
    )
    columns = {"user": [b"\xff", b"x"], "item": ["a", "b"], "rating": [3, 7], "time": [T0, T0]}
    parquet.write_table(pa.table(columns), folder / "bytes.parquet")
    assert "column 'user' is not UTF-8" in refused(folder, folder / "bytes.parquet")
    parquet.write_table(pa.table(columns | {"user": [1.0, np.inf]}), folder / "inf.parquet")
    assert "row 2: user inf is no id" in refused(folder, folder / "inf.parquet")


def test_a_separator_of_several_bytes_that_is_there(folder):
    text = (folder / "log.csv").read_text().replace(",", "§")
    (folder / "log.csv").write_text(text)
    assert "no event matches rating<0" in refused(folder, folder / "log.csv", "--separator", "§", dislike="rating<0")


def test_unknown_format(folder):
    (folder / "log.xls").write_text("x")
    assert "log.xls: unknown format '.xls'" in refused(folder, folder / "log.xls")


def test_log_shorter_than_its_horizon(folder):
    assert "a horizon of 28 days needs at least 87" in refused(folder, folder / "log.csv", "--horizon", "28")


@pytest.mark.parametrize(("option", "date"), [("--valid", "2013-06-13"), ("--test", "2030-01-01"), ("--test", "soon")])
def test_dates_that_do_not_fit(folder, option, date):
    message = refused(folder, folder / "log.csv", option, date)
    assert option in message
    assert date in message


def test_a_log_of_one_user_or_one_item(folder):
    header, *rows = (folder / "log.csv").read_text().split()
    for column, what in ((0, "1 user"), (1, "1 item")):
        same = [",".join(["7" if i == column else field for i, field in enumerate(r.split(","))]) for r in rows]
        (folder / "log.csv").write_text("\n".join([header, *same]) + "\n")
        assert f"the log has {what}, expected at least 2" in refused(folder, folder / "log.csv")


def test_a_stray_date(folder):
    spoil(folder / "log.csv", 100, "1,2,3,0")
    message = refused(folder, folder / "log.csv")
    assert (
        "log.csv, line 100: 1970-01-01 is far from the other dates (1 of 360 events are); --from 2013-06-12" in message
    )


def test_text_nulls(folder):
    spoil(folder / "log.csv", 9, f"1,2,NaN,{T0}")
    assert "log.csv, line 9: no value in 'rating'" in refused(folder, folder / "log.csv")
    spoil(folder / "log.csv", 9, f"null,2,3,{T0}")
    assert "log.csv, line 9: no user, expected an id" in refused(folder, folder / "log.csv")


def test_semantic_ids_that_cannot_name_the_items(folder):
    message = refused(folder, folder / "log.csv", "--levels", "1", "--codebook", "2")
    assert "cannot name 30 items apart" in message


def test_output_that_cannot_be_written(folder):
    assert "cannot be written" in refused(folder, folder / "log.csv", out="log.csv/out")
    assert "cannot be written" in refused(folder, folder / "log.csv", out="log.csv/deeper/out")


def test_output_that_is_something_else(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("x")
    for force in ([], ["--force"]):
        assert "exists and is no data set" in refused(folder, folder / "log.csv", *force, out="mine")
    assert "exists and is no data set" in refused(folder, folder / "log.csv", "--force", out="items.csv")


def test_output_inside_a_run_or_a_data_set(folder, tiny_data):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    shutil.copytree(tiny_data, folder / "data")
    for force in ([], ["--force"]):
        for out in ("run/data", "data/deeper/new"):
            assert "a run or a data set; choose another --out" in refused(folder, folder / "log.csv", *force, out=out)
        assert "exists and is no data set" in refused(folder, folder / "log.csv", *force, out="run")


WRITERS = {
    "duckdb": "negfast.prepare.sorter.LogSorter.add",
    "shard": "negfast.data.shards.ShardBuilder.finish",
    "values": "negfast.prepare.writing.shutil.copyfileobj",
    "tensors": "negfast.data.dataset.save_file",
    "tables": "negfast.data.dataset.parquet.write_table",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line(folder, monkeypatch, writer):
    """As each writer of a data set tells it."""

    def full(*_, **__):
        if writer == "tensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WRITERS[writer], full)
    before = sorted(folder.rglob("*"))
    command = ["prepare", str(folder / "log.csv"), "--dislike", "rating<=5", "--value-column", "rating"]
    result = CliRunner().invoke(main, [*command, "--encoder", "tfidf", "--codebook", "8", "--out", str(folder / "out")])
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stderr.count("\n") == 1
    assert f"negfast: {folder / 'out'}: cannot be written: " in result.stderr and "No space left" in result.stderr
    assert sorted(folder.rglob("*")) == before


def test_the_summary_as_json(folder):
    spoil(folder / "log.csv", 9, f"1,2,NaN,{T0}")
    (folder / "log.csv").write_text((folder / "log.csv").read_text() + f"5,3,7,{T0}\n" * 2)
    command = ["prepare", str(folder / "log.csv"), "--dislike", "rating<=5", "--skip-bad-rows", "--drop-repeats"]
    command += [
        "--until",
        "2030-01-01",
        "--encoder",
        "tfidf",
        "--codebook",
        "8",
        "--out",
        str(folder / "out"),
        "--json",
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["data"] == str(folder / "out") and shown["counts"]["events"] == 360
    assert shown["left_out"] == {"before_from": 0, "after_until": 0, "bad_rows": 1, "repeats": 1}
    assert shown["user_days"]["train"]["active"] > shown["user_days"]["valid"]["active"] > 0
    assert shown["split"]["valid"] < shown["split"]["test"]
    assert len(shown["warnings"]) == 2 and "valid has " in shown["warnings"][0]
    assert "split: horizon 7 days" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prepare"], "Missing argument 'FILES...'"),
        (["prepare", "log.csv", "--out", "x"], "Missing option '--dislike'"),
        (["prepare", "log.csv", "--out", "x", "--dislike", "rating=5"], "rule 'rating=5'"),
        (["prepare", "a.csv", "b.csv", "--out", "x", "--dislike", "rating<=5"], "a.csv: no such file"),
        (["prepare", "a", "--out", "x", "--dislike", "a", "--from", "soon"], "--from 'soon': expected a date"),
        (["prepare", "log.csv", "--out", "x", "--recipe", "netflix"], "expected one of kuairand, yambda"),
        (["prepare", "a", "--out", "x", "--recipe", "yambda", "--user-column", "u"], "--user-column has no place"),
        (["prepare", "a", "--out", "x", "--recipe", "movielens", "--dislike", "rating=1"], "rule 'rating=1'"),
        (["prepare", "a", "--out", "x", "--like", "d", "--recipe", "yambda"], "--recipe has no place beside --like"),
        (["prepare", "log.csv", "--out", "x", "--dislike", "a", "--horizon", "x"], "'x' is not a valid integer"),
        (["prepare", "log.csv", "--out", "x", "--dislike", "a", "--wrong"], "No such option"),
        (["train", "--replay", "r/failed/sft-000001", "--set", "sft.lr=1"], "--set has no place beside --replay"),
        (["train", "--replay", "r/failed/sft-000001", "--out", "r"], "--out has no place beside --replay"),
        (["prepare", "a", "--out", "x", "--dislike", "r<3", "--item-text-column", "t"], "place without --items"),
        (
            ["prepare", "a", "--out", "x", "--dislike", "r<3", "--like-rule", "r>4", "--rest", "like"],
            "--rest has no place",
        ),
        (["prepare", "a", "--out", "x", "--dislike", "r<3", "--seed", "-1"], "-1 is not in the range x>=0"),
        (
            ["prepare", "a", "--out", "x", "--dislike", "r<3", "--item-column", "user"],
            "--user-column 'user': found for two of user, item and time",
        ),
        (
            ["prepare", "a", "--out", "x", "--dislike", "r<3", "--from", "2024-02-01", "--until", "2024-01-01"],
            "--from 2024-02-01: expected a day not after --until 2024-01-01",
        ),
        (["wrong"], "No such command 'wrong'"),
        (["inspect", "none"], "none: no such file or directory"),
    ],
)
def test_usage(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "grpo.stepz=1"], "--set: unknown key 'grpo.stepz', did you mean 'grpo.steps'?"),
        (["--set", "grpo.lr=-1"], "--set: grpo.lr is -1.0, expected more than 0.0"),
        (["--preset", "fast"], "--preset 'fast': expected one of"),
        (["unknown.toml"], "unknown.toml: unknown section 'gpro', did you mean 'grpo'?"),
        (["range.toml"], "range.toml: prior.eps is 0.0, expected more than 0.0"),
        (["broken.toml"], "broken.toml: not TOML"),
        (["missing.toml"], "missing.toml: no such file"),
        (["--data", "missing"], "missing: no such data set directory"),
    ],
)
def test_settings_of_training(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.toml").write_text("[gpro]\nsteps = 1\n")
    (tmp_path / "range.toml").write_text("[prior]\neps = 0\n")
    (tmp_path / "broken.toml").write_text("[prior\n")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(main, ["train", *arguments, "--out", "run"])
    assert result.exit_code == 2, (result.output, result.exception)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_ranks_that_torchrun_started_are_as_many_as_asked_for(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, ["train", "--gpus", "4"])
    assert result.exit_code == 2 and "--gpus 4: found 2 ranks started by torchrun" in result.stderr


def test_semantic_ids_of_settings_are_those_of_the_data(tiny_data, tmp_path):
    """A setting that a given data set cannot follow is refused, and one that it follows is not."""
    run = tmp_path / "run"
    arguments = ["train", "--data", str(tiny_data), "--out", str(run), "--set", "sid.quantizer=random"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "sid.quantizer: found random, but" in result.stderr and "was prepared with rq-kmeans" in result.stderr
    assert not run.exists()
