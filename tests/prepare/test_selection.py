"""What of a log is read: nulls in every format, rows that are skipped, days that are cut, repeats, several files."""

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.prepare.events import EventMapping, ItemMapping, Selection, read_items, with_attributes
from negfast.prepare.reading import read_events
from negfast.prepare.rules import Rule, parse_rule
from tests.prepare.test_events import T0, mapping, read, silent, write_rows

SPELLINGS = ["NaN", "nan", "NULL", "null", "None", "N/A", "NA", "<NA>", " NaT ", "\\N", ""]
ROWS: list[dict[str, Any]] = [
    {"user": f"u{i}", "item": f"i{i}", "rating": 1 + 8 * (i % 2), "time": T0 + i} for i in range(8)
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "dat", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["user", "item", "rating"])
@pytest.mark.parametrize("text", SPELLINGS)
def test_nulls_are_nulls_in_every_format(tmp_path, kind, column, text):
    rows = [{**row, column: str(row[column])} for row in ROWS]
    rows[3][column] = text
    path = write_rows(tmp_path / f"log.{kind}", rows)
    columns = ("user", "item", "rating", "time") if kind == "dat" else None
    place = {"dat": "line 4", "jsonl": "line 4", "parquet": "row 4"}.get(kind, "line 5")
    what = "no value in 'rating'" if column == "rating" else f"no {column}, expected an id"
    with pytest.raises(InputError, match=f"{place}: {what}"):
        read([path], mapping(columns=columns))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("text", ["inf", "-inf", "Infinity"])
@pytest.mark.parametrize("value", [None, "rating"])
def test_an_infinite_rating_is_no_like(tmp_path, kind, text, value):
    rows = [{**row, "rating": float(row["rating"])} for row in ROWS]
    rows[3]["rating"] = float(text) if kind == "parquet" else text
    path = write_rows(tmp_path / f"log.{kind}", rows)
    with pytest.raises(InputError, match=r"(line 5|row 4): rule rating<=5: rating '?-?[iI]nf.* is not a number"):
        read([path], mapping(value=value))


def test_a_null_is_the_rest_where_the_rest_is_exposed(tmp_path):
    """A rule does not hold on a null; only where all others are likes does nothing tell what the event is."""
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,time,rating,hide\n1,1,{T0},NaN,0\n1,2,{T0},NaN,1\n1,3,{T0},9,0\n1,4,{T0},1,NaN\n")
    two = EventMapping(dislike=(parse_rule("rating<=2"), parse_rule("hide")))
    assert read([path], two).log.feedback.tolist() == [EXPOSED, DISLIKE, LIKE, DISLIKE]
    liked = mapping("hide", like=(parse_rule("rating>=5"),))
    assert read([path], liked).log.feedback.tolist() == [EXPOSED, DISLIKE, LIKE, EXPOSED]
    assert read([path], mapping("hide", rest="exposed")).log.feedback.tolist() == [EXPOSED, DISLIKE, EXPOSED, EXPOSED]
    with pytest.raises(InputError, match="line 5: no value in 'hide', so the event is neither a dislike nor a like"):
        read([path], mapping("hide"))


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"dislike": ("action==Hide",)}, r"matches action==Hide; action holds view \(5\), hide \(2\), buy \(1\)"),
        ({"dislike": ("action==hide", "rating<0")}, r"no event matches rating<0; rating holds 9 \(8\)"),
        ({"dislike": ("action==hide",), "like": ("action==sold",)}, "no event matches action==sold; action holds"),
        ({"dislike": ("rating>1",)}, r"no likes: every event matches rating>1; rating holds 9 \(8\)"),
        ({"dislike": ("rating>1",), "like": ("action==buy",)}, "no likes: no event matches action==buy and is"),
    ],
)  # fmt: skip
def test_a_rule_that_matches_nothing_is_named(tmp_path, rules, said):
    path = tmp_path / "log.csv"
    words = ["hide", "view", "view", "buy", "hide", "view", "view", "view"]
    path.write_text("user,item,time,action,rating\n" + "".join(f"u,{i},{T0},{w},9\n" for i, w in enumerate(words)))
    parsed: dict[str, Any] = {kind: tuple(map(parse_rule, texts)) for kind, texts in rules.items()}
    with pytest.raises(InputError, match=said):
        read_events([path], EventMapping(**parsed, time_unit="s"), silent)


def test_no_likes_may_be_said(tmp_path):
    path = write_rows(tmp_path / "log.csv", ROWS)
    said: list[str] = []
    events, _ = read_events([path], mapping(rest="exposed"), said.append)
    assert set(events.log.feedback) == {DISLIKE, EXPOSED}
    assert any(line.startswith("warning: no likes") for line in said)


@pytest.mark.parametrize("literal", ["NaN", "null", "'None'"])
def test_a_rule_about_nulls_is_refused(literal):
    with pytest.raises(InputError, match="how a missing value is written"):
        parse_rule(f"action=={literal}")


@pytest.mark.parametrize("name", ["my rating", "a:b", "a.b", "a<b=c!", " lead", 'say "x"', "it's", "ä%$#"])
def test_any_column_name(tmp_path, name):
    """In rules, as user, item, time and value, and through the text that a manifest keeps of a rule."""
    quote = "'" if '"' in name else '"'
    rule = parse_rule(f"{quote}{name}{quote}<=5")
    assert rule == Rule(name, "<=", "5") and parse_rule(str(rule)) == rule
    for kind in ("csv", "jsonl", "parquet"):
        path = write_rows(
            tmp_path / f"log.{kind}", [{**row, name: row["rating"]} for row in ROWS], ["item", "time", name]
        )
        events = read([path], EventMapping(dislike=(rule,), user=name, value=name, time_unit="s"))
        assert sorted(events.log.feedback.tolist()) == [LIKE] * 4 + [DISLIKE] * 4
        assert events.user_ids == ["1", "9"]


@given(st.text("ab <>=!'\".:", min_size=1), st.sampled_from(["==", "!="]), st.text("ab'\" ", min_size=1))
def test_a_rule_is_read_back_from_its_text(column, comparison, literal):
    if not ('"' in column and "'" in column) and literal.strip():
        rule = Rule(column, comparison, literal, True)
        assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["genres:|"], ("genres", "|")),
        (["a:b"], ("a:b", "")),
        (["a:b:;"], ("a:b", ";")),
        (["a:b::"], ("a:b", ":")),
        (["x y"], ("x y", "")),
        (["c:d"], ("c", "d")),
        (["none:|"], ("none", "|")),
    ],
)
def test_attributes_of_any_column_name(tmp_path, given, expected):
    path = tmp_path / "items.csv"
    path.write_text("item,genres,a:b,x y,c\n1,A|B,p;q,z,1d2\n")
    made = with_attributes(ItemMapping(), path, given)
    assert made.attributes == (expected,)
    if expected[0] != "none":
        assert list(read_items(path, made).attributes) == [expected[0]]
    with pytest.raises(InputError, match="is there twice"):
        with_attributes(ItemMapping(), path, [*given, *given])


def bad_rows(kind):
    """A log of 8 good rows and 9 bad ones, as lines, and the lines that are bad."""
    good = [[row[name] for name in ("user", "item", "rating", "time")] for row in ROWS]
    bad = [["", "a", 1, T0], ["u", "null", 1, T0], ["u", "a", "x", T0], ["u", "a", "inf", T0], ["u", "a", "NaN", T0],
           ["u", "a", 1, "soon"], ["u", "a", 1, -5], ["u", "a", 1, 10**11], ["u", "a", 1, ""]]  # fmt: skip
    rows = [row for pair in zip(bad, good, strict=False) for row in pair] + [bad[8]]
    if kind == "jsonl":
        keys = ("user", "item", "rating", "time")
        return [json.dumps(dict(zip(keys, map(str, row), strict=True))) for row in rows], len(bad)
    return ["user,item,rating,time", *(",".join(map(str, row)) for row in rows)], len(bad)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_bad_rows_are_skipped_counted_and_shown(tmp_path, kind):
    lines, count = bad_rows("csv" if kind == "parquet" else kind)
    broken = {"csv": ["u,a", "u,a,1,2,3", "ô,a,1,2"], "jsonl": ['{"user"', "[1]", '{"user": "ô"}'], "parquet": []}[kind]
    path = tmp_path / f"log.{kind}"
    if kind == "parquet":
        columns = list(zip(*(line.split(",") for line in lines[1:]), strict=True))
        parquet.write_table(pa.table(dict(zip(lines[0].split(","), map(list, columns), strict=True))), path)
    else:
        body = [*lines[:5], "", broken[0], *lines[5:9], broken[1], broken[2], *lines[9:]]
        path.write_bytes("\n".join(body).encode("latin-1"))
    said: list[str] = []
    selection = Selection(skip_bad_rows=True)
    rules = EventMapping(dislike=(parse_rule("rating<=5"),), value="rating", time_unit="s")
    events, _ = read_events([path], rules, said.append, selection)
    assert events.user_ids == [f"u{i}" for i in range(8)]
    assert events.log.value is not None and events.log.value.tolist() == [row["rating"] for row in ROWS]
    assert selection.left_out == {"bad_rows": count + len(broken)}
    assert said[0] == f"bad rows: {count + len(broken)} skipped, 8 rows left:"
    shown = said[1:]
    assert len(shown) == min(10, count + len(broken)) and all(str(path) in line for line in shown)
    if kind != "parquet":  # the line that is named is the line that is bad
        whole = path.read_bytes().decode("latin-1").split("\n")
        named = [whole[int(line.split("line ")[1].split(":")[0]) - 1] for line in shown]
        assert not set(named) & {line for line in lines if '"u0"' in line or line.startswith("u0")}
        assert {broken[0], broken[1]} <= set(named) and len(set(named)) == 10
    with pytest.raises(InputError):
        read_events([path], rules, silent)


def test_iso_times_with_bad_ones_among_them(tmp_path):
    path = tmp_path / "log.csv"
    times = [
        "",
        "2013-06-17T00:00:00Z",
        "yesterday",
        "2013-06-18T00:00:00+02:00",
        "2013-06-19",
        "2013-06-20T00:00:00.1234567Z",
    ]
    path.write_text("user,item,rating,time\n" + "".join(f"u,i,{i % 2 * 9},{t}\n" for i, t in enumerate(times)))
    events = read([path], mapping(time_unit="auto"), selection=Selection(skip_bad_rows=True))
    assert events.log.time.tolist() == [1371427200, 1371506400, 1371686400]
    with pytest.raises(InputError, match="line 2: time '' is no time, expected ISO 8601 with an offset"):
        read([path], mapping(time_unit="auto"))


@pytest.mark.parametrize("unit", ["ns", "auto"])
def test_nanoseconds(tmp_path, unit):
    path = tmp_path / "log.csv"
    path.write_text("user,item,rating,time\n" + "".join(f"u,i,{i},{T0}00000000{i}\n" for i in (7, 3, 9)))
    log = read([path], mapping(time_unit=unit, value="rating")).log
    assert log.time.tolist() == [T0] * 3 and log.value.tolist() == [3, 7, 9]  # in the order of the nanoseconds
    column = pa.array([T0 * 10**9 + tick for tick in (2, 1)], pa.timestamp("ns"))
    parquet.write_table(
        pa.table({"user": ["u"] * 2, "item": ["i"] * 2, "rating": [2, 1], "time": column}), tmp_path / "a.parquet"
    )
    log = read([tmp_path / "a.parquet"], mapping(time_unit="auto", value="rating")).log
    assert log.time.tolist() == [T0] * 2 and log.value.tolist() == [1, 2]


def days_of(log):
    return sorted(set((log.time // DAY).tolist()))


def test_days_are_cut(tmp_path):
    first = T0 // DAY
    rows = [{**ROWS[i % 8], "time": (first + i) * DAY + 7} for i in range(20)]
    path = write_rows(tmp_path / "log.csv", [{**ROWS[0], "time": -1}, *rows, {**ROWS[0], "time": 10**11}])
    selection = Selection(first_day=first + 3, last_day=first + 10)
    assert days_of(read([path], mapping(), selection=selection).log) == list(range(first + 3, first + 11))
    assert selection.left_out == {"before_from": 4, "after_until": 10}
    with pytest.raises(InputError, match="no events are left"):
        read([path], mapping(), selection=Selection(first_day=first + 50, last_day=first + 60))


@pytest.mark.parametrize(("stray", "option"), [(0, "--from 2013-06-12"), (T0 + 900 * DAY, "--until 2013-08-30")])
def test_a_stray_date_is_named_with_its_row(tmp_path, stray, option):
    rows = [{**ROWS[i % 8], "time": T0 + i * DAY // 10} for i in range(800)]
    rows[500]["time"] = rows[600]["time"] = stray
    path = write_rows(tmp_path / "log.csv", rows)
    date = datetime.fromtimestamp(stray, UTC).date()
    with pytest.raises(
        InputError, match=rf"line 502: {date} is far from the other dates \(2 of 800 .* {option} leaves"
    ):
        read([path], mapping())
    cut: dict[str, Any] = {"first_day": T0 // DAY} if stray == 0 else {"last_day": T0 // DAY + 100}
    assert len(read([path], mapping(), selection=Selection(**cut)).log) == 798
    kept: dict[str, Any] = {"first_day": 0} if stray == 0 else {"last_day": stray // DAY}
    assert len(read([path], mapping(), selection=Selection(**kept)).log) == 800  # whoever says so may keep them


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=150))
def test_a_log_without_a_gap_at_its_ends_has_no_stray_date(tmp_path_factory, days):
    days = [*days, *range(min(days), max(days) + 1, 29)]
    rows = [{**ROWS[i % 8], "time": day * DAY} for i, day in enumerate(days)]
    assert len(read([write_rows(tmp_path_factory.mktemp("days") / "log.csv", rows)], mapping()).log) == len(rows)


@given(st.data())
def test_repeats_are_those_of_a_slow_reference(data):
    n = data.draw(st.integers(0, 30))
    column = lambda *values: np.array(data.draw(st.lists(st.sampled_from(values), min_size=n, max_size=n)))  # noqa: E731
    user, time = column(0, 1, 2).astype(int), column(5, 6).astype(np.int64)
    order = np.lexsort((time, user))
    value = column(1.0, 2.0, np.nan).astype(np.float32) if data.draw(st.booleans()) else None
    offsets = np.searchsorted(user[order], np.arange(4))
    log = EventLog(
        offsets, column(0, 1).astype(np.int32), column(LIKE, DISLIKE).astype(np.uint8), time[order], value, 2
    )
    values = [0] * n if value is None else [None if np.isnan(v) else v for v in value]
    keys = list(
        zip(log.user.tolist(), log.time.tolist(), log.item.tolist(), log.feedback.tolist(), values, strict=True)
    )
    expected = [key in keys[:row] for row, key in enumerate(keys)]
    assert log.repeats().tolist() == expected
    kept = log.without(log.repeats())
    assert not kept.repeats().any() and len(kept) == n - sum(expected)
    assert list(zip(kept.user.tolist(), kept.time.tolist(), strict=True)) == [
        key[:2] for key, again in zip(keys, expected, strict=True) if not again
    ]


@pytest.mark.parametrize("kinds", [("csv", "csv.gz", "tsv"), ("parquet", "parquet"), ("jsonl", "csv")])
def test_several_files_are_one_log(tmp_path, kinds):
    texts = [{name: str(value) for name, value in row.items()} for row in ROWS]
    rows = texts if "jsonl" in kinds else ROWS
    parts = [write_rows(tmp_path / f"{n}.{kind}", rows[n :: len(kinds)]) for n, kind in enumerate(kinds)]
    whole = read([write_rows(tmp_path / "whole.csv", ROWS)], mapping(value="rating"))
    joined = read(parts, mapping(value="rating"))
    assert (joined.user_ids, joined.item_ids) == (whole.user_ids, whole.item_ids)
    assert joined.log.time.tolist() == whole.log.time.tolist() and joined.log.value.tolist() == whole.log.value.tolist()


def test_a_bad_row_of_the_second_file_is_named(tmp_path):
    first = write_rows(tmp_path / "first.csv", ROWS)
    second = write_rows(tmp_path / "second.csv", [ROWS[0], {**ROWS[1], "user": "null"}])
    with pytest.raises(InputError, match=r"second\.csv, line 3: no user"):
        read([first, second], mapping())
    said: list[str] = []
    selection = Selection(skip_bad_rows=True)
    assert len(read([first, second], mapping(), report=said.append, selection=selection).log) == 9
    assert "second.csv, line 3" in said[1]


def test_items_that_only_the_log_knows_come_last_without_text(tmp_path):
    log = write_rows(tmp_path / "log.csv", ROWS)
    table = tmp_path / "items.csv"
    said: list[str] = []
    table.write_text("item,title\ni5,Five\ni0,Zero\nother,Other\n")
    np.save(tmp_path / "own.npy", np.ones((3, 2)))
    items = read_items(table, ItemMapping(text="title"), tmp_path / "own.npy")
    events, all_items = read_events([log], mapping(), said.append, items=items)
    assert all_items.ids == ["i5", "i0", "other", "i1", "i2", "i3", "i4", "i6", "i7"] == events.item_ids
    assert all_items.text[:4] == ["Five", "Zero", "Other", ""]
    assert all_items.embedding is not None and not all_items.embedding[3:].any()
    assert "items: 6 of the log are not in the item table, and stay without text" in said
