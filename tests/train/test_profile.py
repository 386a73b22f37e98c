"""Profiles: ranges and operations of a run, and the table of an nsys report."""

import json
import sqlite3

import pytest

from negfast import spans
from negfast.errors import InputError
from negfast.files import locked
from negfast.train.profile import busy_time, table_of_report
from tests.tiny import run_cli, train_arguments


def test_profile_names_every_range_of_a_step_and_the_slowest_operations(tiny_data, tmp_path):
    run = tmp_path / "run"
    shown = run_cli("profile", "--stage", "grpo", "--steps", "2", *train_arguments(tiny_data, run)[1:])
    for name in ("data", "history", "level 2", "level 3", "reference", "loss", "backward", "optimiser"):
        assert f"\n{name} " in shown, name
    assert "top 10, own time" in shown and "MFU" in shown
    trace = json.loads((run / "profile" / "grpo.json").read_text())
    assert {"level 2", "reference"} <= {event.get("name") for event in trace["traceEvents"]}
    assert spans.span("history") is spans.NOTHING  # off again
    assert "expected one of align, sft, grpo" in run_cli("profile", "--stage", "x", "--out", str(run), code=2)
    with locked(run):  # by `negfast train`, say
        assert "is being written by process" in run_cli("profile", "--out", str(run), code=2)


@pytest.fixture
def report(tmp_path):
    """An export of nsys with two kernels and two ranges; times in ns."""
    path = tmp_path / "report.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(
            """
            CREATE TABLE StringIds (id INTEGER, value TEXT);
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, shortName INTEGER);
            CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, text TEXT, textId INTEGER);
            INSERT INTO StringIds VALUES (1, 'gemm'), (2, 'trie_grpo'), (3, 'history');
            INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (0, 4000000, 1), (3000000, 5000000, 2),
                (9000000, 10000000, 1);
            INSERT INTO NVTX_EVENTS VALUES (0, 6000000, NULL, 3), (6000000, 8000000, 'loss', NULL),
                (7, NULL, 'mark', NULL);
            """
        )
    return path


def test_a_report_of_nsys_becomes_a_table(report):
    lines = [line.split() for line in table_of_report(report)]
    assert lines[0] == ["GPU", "busy", "60.0%", "of", "10.0", "ms"]
    assert ["history", "6.0", "1", "60.0%"] in lines and ["loss", "2.0", "1", "20.0%"] in lines
    assert lines.index(["gemm", "5.0", "2", "50.0%"]) < lines.index(["trie_grpo", "2.0", "1", "20.0%"])
    assert not any("mark" in line for line in lines)


def test_what_is_no_report_is_refused(tmp_path):
    other = tmp_path / "x.sqlite"
    other.write_text("not a database, but long enough to be looked at as one " * 20)
    with pytest.raises(InputError, match="is no SQLite export"):
        table_of_report(other)


def test_busy_time_counts_overlaps_once():
    assert busy_time([(0, 10), (2, 4), (8, 12), (20, 21)]) == 13
