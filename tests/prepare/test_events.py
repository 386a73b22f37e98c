"""Events and items from every format against a slow reference; rules, times, places of errors."""

import csv
import gzip
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from negfast.data.log import DISLIKE, EXPOSED, LIKE
from negfast.errors import InputError
from negfast.prepare.events import EventMapping, ItemMapping, read_items
from negfast.prepare.readers import Source, encode
from negfast.prepare.reading import read_events
from negfast.prepare.rules import parse_rule

NAMES = ["user", "item", "rating", "time"]
FORMATS = ["parquet", "csv", "tsv", "dat", "jsonl", "csv.gz", "tsv.zst", "jsonl.zst", "dat.gz"]
T0 = 1_371_000_000


def write_rows(path, rows, names=NAMES):
    """Writes dicts in the format that the suffix names, without the readers' help."""
    kind, _, compression = path.name.partition(".")[2].partition(".")
    if kind == "parquet":
        parquet.write_table(pa.table({n: [row[n] for row in rows] for n in names}), path)
        return path
    if kind == "jsonl":
        text = "".join(json.dumps({n: row[n] for n in names}) + "\n" for row in rows)
    elif kind == "dat":
        text = "".join("::".join(str(row[n]) for n in names) + "\n" for row in rows)
    else:
        separator = "," if kind == "csv" else "\t"
        lines = [names, *([row[n] for n in names] for row in rows)]
        path_text = path.with_suffix(".raw")
        with path_text.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=separator, lineterminator="\n").writerows(lines)
        text = path_text.read_text("utf-8")
    data = text.encode()
    compress: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}
    path.write_bytes(compress[compression](data))
    return path


def mapping(rule="rating<=5", **options):
    return EventMapping(dislike=(parse_rule(rule),), time_unit=options.pop("time_unit", "s"), **options)


def silent(_):
    pass


def read(paths, mapping, known=None, report=silent, selection=None):
    """The events of files that need not be a whole log: they may lack likes, or events of a rule."""
    return read_events(paths, mapping, report, selection, known=known, whole=False)[0]


@st.composite
def rows_of_events(draw):
    ids = st.one_of(st.integers(0, 20).map(str), st.sampled_from(["007", "7", "ä b", "x,y", "NAN0", "nullable"]))
    row = st.fixed_dictionaries(
        {"user": ids, "item": ids, "rating": st.integers(1, 10), "time": st.integers(T0, T0 + 50)}
    )
    return [*draw(st.lists(row, max_size=30)), {"user": "1", "item": "2", "rating": 1, "time": T0}]


@given(rows=rows_of_events(), kind=st.sampled_from(FORMATS))
@settings(max_examples=150, deadline=None)
def test_every_format_gives_the_log_of_a_slow_reference(tmp_path_factory, rows, kind):
    path = write_rows(tmp_path_factory.mktemp("events") / f"log.{kind}", rows)
    columns = tuple(NAMES) if kind.startswith("dat") else None
    events = read([path], mapping(value="rating", columns=columns))

    users = sorted({row["user"] for row in rows}, key=lambda text: (len(text), text))
    items = sorted({row["item"] for row in rows}, key=lambda text: (len(text), text))
    assert events.user_ids == users
    assert events.item_ids == items
    expected = []
    for user in users:
        own = sorted((row for row in rows if row["user"] == user), key=lambda row: row["time"])
        expected += [(users.index(user), items.index(r["item"]), r["rating"], r["time"]) for r in own]
    log = events.log
    assert list(zip(log.user, log.item, log.value, log.time, strict=True)) == expected
    assert [bool(f == DISLIKE) for f in log.feedback] == [rating <= 5 for _, _, rating, _ in expected]
    assert [f for f in log.feedback if f != DISLIKE] == [LIKE] * sum(rating > 5 for _, _, rating, _ in expected)
    assert log.n_items == len(items)
    dtypes = (log.user_offsets.dtype, log.item.dtype, log.feedback.dtype, log.time.dtype, log.value.dtype)
    assert dtypes == (np.int64, np.int32, np.uint8, np.int64, np.float32)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_rules_hold_where_python_says_so(tmp_path_factory, data):
    ratings = data.draw(st.lists(st.one_of(st.none(), st.integers(-3, 3)), min_size=1, max_size=20))
    ratings.append(data.draw(st.integers(-3, 3)))
    comparison = data.draw(st.sampled_from(["<=", "<", ">=", ">", "==", "!="]))
    bound = data.draw(st.sampled_from([-2, 0, 1.5, 3]))
    like_bound = data.draw(st.one_of(st.none(), st.integers(-3, 3)))
    rest = data.draw(st.sampled_from(["like", "exposed"]))
    known = [rating for rating in ratings if rating is not None]
    holds = {r: eval(f"{r} {comparison} {bound}") for r in known}
    path = tmp_path_factory.mktemp("rules") / "log.csv"
    path.write_text("user,item,time,rating\n" + "".join(f"1,2,{T0},{'' if r is None else r}\n" for r in ratings))
    like = () if like_bound is None else (parse_rule(f"rating > {like_bound}"),)
    rules = mapping(f"rating {comparison} {bound}", like=like, rest=rest)

    if rest == "like" and not like and None in ratings:
        with pytest.raises(InputError, match=f"line {ratings.index(None) + 2}: no value in 'rating'"):
            read([path], rules)
        return
    found = read([path], rules).log.feedback
    for rating, kind in zip(ratings, found, strict=True):
        if rating is None:
            assert kind == EXPOSED
        elif holds[rating]:
            assert kind == DISLIKE
        elif like_bound is not None:
            assert kind == (LIKE if rating > like_bound else EXPOSED)
        else:
            assert kind == (LIKE if rest == "like" else EXPOSED)


@pytest.mark.parametrize(
    ("column", "rule", "disliked"),
    [
        (["hide", "like", "show"], "action==hide", [True, False, False]),
        (["hide", "like", "show"], "action!='show'", [True, True, False]),
        (["true", "False", "1"], "action", [True, False, True]),
        (["1", "x", "2"], "action==1", [True, False, False]),
        (["01", "1", "1.0"], "action=='1'", [False, True, False]),
        (["01", "2", "1.0"], "action==1", [True, False, True]),
    ],
)
def test_text_rules(tmp_path, column, rule, disliked):
    path = tmp_path / "log.csv"
    path.write_text("user,item,time,action\n" + "".join(f"1,{i},{T0},{v}\n" for i, v in enumerate(column)))
    log = read([path], mapping(rule)).log
    assert (log.feedback == DISLIKE).tolist() == disliked


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_typed_booleans_and_integer_ids(tmp_path, kind):
    rows = [{"user": 10, "item": 3, "hate": True, "time": T0}, {"user": 9, "item": 3, "hate": False, "time": T0}]
    path = write_rows(tmp_path / f"log.{kind}", rows, ["user", "item", "hate", "time"])
    for rule in ("hate", "hate==true", "hate!=0"):
        events = read([path], mapping(rule))
        assert events.user_ids == ["9", "10"]  # numeric order
        assert events.log.feedback.tolist() == [LIKE, DISLIKE]


def test_several_rules_are_joined_by_or(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,time,rating,hide\n1,1,{T0},1,0\n1,2,{T0},5,1\n1,3,{T0},5,0\n")
    rules = EventMapping(dislike=(parse_rule("rating<=2"), parse_rule("hide")))
    assert read([path], rules).log.feedback.tolist() == [DISLIKE, DISLIKE, LIKE]


@pytest.mark.parametrize("text", ["", "<=5", "rating<=", "rating<=high", "rating=5", "rating<='5'"])
def test_a_rule_that_is_none(text):
    with pytest.raises(InputError, match="rule"):
        parse_rule(text)


@given(seconds=st.integers(0, 1_700_000_000), unit=st.sampled_from(["s", "ms", "us"]), extra=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_units(tmp_path_factory, seconds, unit, extra):
    scale = {"s": 1, "ms": 1000, "us": 1_000_000}[unit]
    ticks = seconds * scale + (extra if scale > 1 else 0)
    path = tmp_path_factory.mktemp("units") / "log.csv"
    path.write_text(f"user,item,time,rating\n1,2,{ticks},1\n")
    assert read([path], mapping(time_unit=unit)).log.time.tolist() == [ticks // scale]


@given(
    moment=st.datetimes(datetime(2000, 1, 1), datetime(2024, 1, 1)),
    offset=st.sampled_from([None, "Z", "+02:00", "-0330"]),
    separator=st.sampled_from("T "),
    unit=st.sampled_from(["auto", "iso"]),
)
@settings(max_examples=60, deadline=None)
def test_iso_times(tmp_path_factory, moment, offset, separator, unit):
    path = tmp_path_factory.mktemp("iso") / "log.csv"
    path.write_text(f"user,item,time,rating\n1,2,{moment.isoformat(separator)}{offset or ''},1\n")
    shift = {None: 0, "Z": 0, "+02:00": 2, "-0330": -3.5}[offset]
    expected = math.floor((moment.replace(tzinfo=UTC) - timedelta(hours=shift)).timestamp())
    assert read([path], mapping(time_unit=unit)).log.time.tolist() == [expected]


@pytest.mark.parametrize(("scale", "unit"), [(1, "s"), (1_000, "ms"), (1_000_000, "us")], ids=["seconds", "ms", "us"])
def test_auto_tells_the_unit_and_says_so(tmp_path, scale, unit):
    path = tmp_path / "log.csv"
    path.write_text("user,item,time,rating\n" + "".join(f"1,2,{(T0 + i) * scale},1\n" for i in range(5)))
    said: list[str] = []
    log = read([path], mapping(time_unit="auto"), report=said.append).log
    assert log.time.tolist() == [T0 + i for i in range(5)]
    assert any(f" {unit} " in line for line in said)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([datetime(2013, 6, 17, 1), datetime(2013, 6, 18)], pa.timestamp("ns")),
        pa.array([datetime(2013, 6, 17, 1), datetime(2013, 6, 18)], pa.timestamp("ms", "Europe/Berlin")),
        pa.array([1_371_430_800.75, 1_371_513_600.0]),
    ],
    ids=["naive", "zoned", "float"],
)
def test_typed_times_of_parquet(tmp_path, column):
    path = tmp_path / "log.parquet"
    parquet.write_table(pa.table({"user": [1, 1], "item": [1, 2], "rating": [1, 1], "time": column}), path)
    log = read([path], mapping(time_unit="auto")).log
    assert log.time.tolist() == [1_371_430_800, 1_371_513_600]


def test_order_within_a_second_follows_the_finer_time(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,time,rating\n1,2,{T0}900,9\n1,2,{T0}100,1\n1,3,{T0}100,2\n")
    log = read([path], mapping(time_unit="ms", value="rating")).log
    assert log.value.tolist() == [1, 2, 9]  # equal times keep the order of the lines
    assert log.time.tolist() == [T0] * 3


def test_order_where_users_and_microseconds_overflow_one_key(tmp_path):
    rng = np.random.default_rng()
    n_users, ticks = 9000, rng.integers(0, 1_700_000_000_000_000, 20_000)
    user = rng.integers(0, n_users, 20_000)
    path = tmp_path / "log.parquet"
    parquet.write_table(pa.table({"user": user, "item": user, "rating": np.ones(20_000), "time": ticks}), path)
    events = read([path], mapping(time_unit="us"))
    found = [(int(events.user_ids[u]), t) for u, t in zip(events.log.user, events.log.time, strict=True)]
    assert found == sorted(zip(user.tolist(), (ticks // 1_000_000).tolist(), strict=True))


@given(chunks=st.lists(st.lists(st.sampled_from(["a", "b", "c", "", None]), max_size=4), max_size=5))
def test_encoding_of_a_column_in_chunks(chunks):
    table = pa.table({"x": pa.chunked_array(chunks, pa.string())})
    column = encode(Source(Path("x.parquet"), table), "x")
    expected = [value or None for chunk in chunks for value in chunk]
    assert [None if code < 0 else column.values[int(code)].as_py() for code in column.codes] == expected
    assert len(set(column.values.to_pylist())) == len(column.values)


def test_line_numbers_count_the_header_and_empty_lines(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,time,rating\n\n1,2,{T0},1\n\n\n1,2,soon,1\n")
    with pytest.raises(InputError, match=r"log\.csv, line 6: time 'soon' is no time"):
        read([path], mapping())


@pytest.mark.parametrize("row", [0, 1, 17, 63, 99])
def test_the_first_bad_row_is_named(tmp_path, row):
    times = [str(T0 + i) for i in range(100)]
    for later in (row, 99):
        times[later] = f"bad{later}"
    path = tmp_path / "log.parquet"
    parquet.write_table(pa.table({"user": [1] * 100, "item": [1] * 100, "rating": [1] * 100, "time": times}), path)
    with pytest.raises(InputError, match=rf"row {row + 1}: time 'bad{row}'"):
        read([path], mapping())


def test_items_with_text_attributes_and_quoted_line_breaks(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text('item,title,genres,brand\n007,"A, B\nC",Crime| Drama ,x\n7,,,\n', "utf-8")
    items = read_items(path, ItemMapping(text="title", attributes=(("genres", "|"), ("brand", ""))))
    assert items.ids == ["007", "7"]
    assert items.text == ["A, B\nC", ""]
    assert items.attributes == {"genres": [("Crime", "Drama"), ()], "brand": [("x",), ()]}


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()])
def test_strings_of_any_layout_and_attributes_with_fractions(tmp_path, kind):
    """As polars writes them; a price is no id, but an attribute all the same."""
    log, items = tmp_path / "log.parquet", tmp_path / "items.parquet"
    times = pa.array(["2013-06-01 10:00:00", "2013-06-02 11:00:00"], kind)
    columns = {"user": pa.array(["u", "v"], kind), "item": pa.array(["a", "b"], kind), "rating": [1, 9], "time": times}
    parquet.write_table(pa.table(columns), log)
    events = read([log], mapping(time_unit="auto"))
    assert events.user_ids == ["u", "v"] and np.diff(events.log.time).tolist() == [25 * 3600]
    parquet.write_table(pa.table({"item": ["a", "b"], "price": [12.5, 3.0]}), items)
    assert read_items(items, ItemMapping(attributes=(("price", ""),))).attributes == {"price": [("12.5",), ("3",)]}


def test_items_with_list_attributes(tmp_path):
    path = tmp_path / "items.parquet"
    parquet.write_table(pa.table({"item": [3, 1], "tags": [["a", "b"], None]}), path)
    items = read_items(path, ItemMapping(attributes=(("tags", ""),)))
    assert items.ids == ["3", "1"]  # the order of the table
    assert items.attributes == {"tags": [("a", "b"), ()]}


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_item_embedding(tmp_path, kind):
    embedding = np.random.default_rng().normal(size=(3, 5)).astype(np.float32)
    path = tmp_path / f"embedding.{kind}"
    if kind == "npy":
        np.save(path, embedding)
    elif kind == "safetensors":
        save_file({"x": embedding}, path)
    else:
        parquet.write_table(pa.table({"vector": embedding.tolist()}), path)
    table = tmp_path / "items.csv"
    table.write_text("item\na\nb\nc\n")
    np.testing.assert_array_equal(read_items(table, ItemMapping(), path).embedding, embedding)
    table.write_text("item\na\nb\n")
    with pytest.raises(InputError, match=r"shape \[3, 5\], expected one row for each of 2 items"):
        read_items(table, ItemMapping(), path)


def test_a_pickled_embedding_is_not_loaded(tmp_path):
    path = tmp_path / "embedding.npy"
    np.save(path, np.array([{"a": 1}], dtype=object))
    table = tmp_path / "items.csv"
    table.write_text("item\na\n")
    with pytest.raises(InputError, match="cannot be read as an embedding"):
        read_items(table, ItemMapping(), path)


def test_events_are_indexed_by_the_item_table(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,time,rating\n1,b,{T0},1\n2,a,{T0},1\n")
    events = read([path], mapping(), ["c", "b", "a"], silent)
    assert events.log.item.tolist() == [1, 2]
    assert events.log.n_items == 3
