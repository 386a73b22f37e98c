"""The page's tables come from the results: what is between the markers is replaced, nothing else."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.experiments.tables import PAGE, RESULTS, TABLES, main, written
from bench.machine import write_result

HALF = {"mean": 0.5, "low": 0.25, "high": 0.75}


def difference(**keys: object) -> dict:
    return {"mean": 0.0052, "low": 0.0021, "high": 0.0084} | keys


def quality() -> dict:
    row = {"name": "boosted", "filter_auc": HALF, "filter_ece": HALF}
    model = {"name": "verdict", "filter_auc": HALF | {"mean": 0.8024}, "filter_reduction": HALF}
    missing = {"mean": None, "low": None, "high": None}
    model |= {"filter_auc/cold_user": missing}
    differences = [
        difference(a="verdict", b="boosted", metric="filter_auc"),
        difference(a="verdict", b="boosted", metric="pool_auc", low=-0.001),
        difference(a="grpo", b="decay-4d", metric="FHR@20"),
    ]
    entry = {"data": "a", "filter_context": "day", "seeds": [0], "differences": differences}
    entry["rows"] = [row, model, {"name": "grpo", "FHR@20": HALF}]
    rows = [row | {"FHR@20": HALF}]
    untrained = {"data": "b", "filter_context": "event", "seeds": [0], "differences": [], "rows": rows}
    return {"entries": [entry, untrained]}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    write_result(folder / "quality.json", quality())
    return folder


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_tables_of_filters_and_lists(results: Path) -> None:
    rows = cells(written("filter", results))
    assert [row[:2] for row in rows[2:]] == [
        ["a, day", "`boosted`"],
        ["a, day", "`verdict`"],
        ["b, event", "`boosted`"],
    ]
    place = {name: rows[0].index(name) for name in ("filter AUC", "filter AUC, cold user", "reduction %", "ECE")}
    assert rows[3][place["filter AUC"]] == ".8024 [.2500, .7500]" and rows[3][place["filter AUC, cold user"]] == ""
    assert rows[3][place["reduction %"]] == "50.0 [25.0, 75.0]" and rows[2][place["ECE"]] == ".5000 [.2500, .7500]"
    rows = cells(written("filter-gains", results))
    assert rows[2:] == [
        ["a, day", "`verdict` - `boosted`", "**+.0052** [+.0021, +.0084]", "", "", "+.0052 [-.0010, +.0084]"]
    ]
    assert [row[:2] for row in cells(written("lists", results))[2:]] == [["a, day", "`grpo`"]]  # a trained run's alone
    assert cells(written("list-gains", results))[2][-1] == "**+.005** [+.002, +.008]"


def test_taste(results: Path) -> None:
    row = {"name": "decoder", "auc": HALF, "by_seed": [0.5, 0.5], "minus_rival": difference(low=-0.001)}
    write_result(results / "taste.json", {"entries": [{"data": "a", "test": 1200, "rows": [row]}]})
    expected = ["a, 1,200", "`decoder`", "2", ".5000 [.2500, .7500]", "+.0052 [-.0010, +.0084]", "", ""]
    assert cells(written("taste", results))[2] == expected


def test_sharpness(results: Path) -> None:
    rows = [
        {"name": name, "temperature": 0.85, "entropy": 4.657, "FHR@20": HALF, "mean_reward": HALF, "nll": HALF}
        for name in ("sft", "grpo")
    ]
    gain = difference(a="grpo", b="sft", metric="FHR@20")
    write_result(results / "sharpness.json", {"test": {"rows": rows, "differences": [gain]}})
    sft, grpo = cells(written("sharpness", results))[2:]
    assert sft == ["test", "`sft`", "0.85", "4.66", ".500", ".50000", ".500", "**+.005** [+.002, +.008]", "", ""]
    assert grpo[1] == "`grpo`" and grpo[-3:] == ["", "", ""]


def test_the_simulator(results: Path) -> None:
    found = {"rows": [{"name": name, "true_probability": HALF} for name in ("window", "window minus next")]}
    effects = [{"name": "IPS", "reduction": HALF, "minus_truth_filled": HALF | {"low": -0.25}}]
    effects.append({"name": "truth", "reduction": HALF})
    write_result(results / "simulator.json", {"filter": {"rows": effects}, "recovery": found})
    made = written("recovery", results)
    assert ["window", ".500", "", ""] in cells(made)
    assert ["window minus next", "**+.500** [+.250, +.750]", "", ""] in cells(made)
    shown = [["IPS", "50.0 [25.0, 75.0]", "50.0 [-25.0, 75.0]"], ["truth", "50.0 [25.0, 75.0]", ""]]
    assert cells(written("simulated-filter", results))[2:] == shown


def test_the_page_keeps_all_else(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- table: filter -->\nbefore\n<!-- end -->\ntext\n")
    command = ["--page", str(page), "--results", str(results)]
    assert CliRunner().invoke(main, command).exit_code == 0
    text = page.read_text()
    assert text.startswith("# Title\n<!-- table: filter -->\n| ") and "before" not in text
    assert text.endswith("<!-- end -->\ntext\n")
    CliRunner().invoke(main, command)
    assert page.read_text() == text
    page.write_text("<!-- table: nonsense -->\n<!-- end -->\n")
    assert "unknown tables nonsense" in CliRunner().invoke(main, command).output


def test_the_page_shows_the_results() -> None:
    """docs/results.md is what the command makes of bench/results."""
    shown = dict(re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL))
    assert set(shown) == set(TABLES)
    for name, table in shown.items():
        assert table == written(name, RESULTS), f"run python -m bench.experiments.tables: {name} has drifted"


def test_a_result_has_a_row_a_line(tmp_path: Path) -> None:
    result = {
        "device": "x",
        "steps": {"sft": 2},
        "rows": [{"a": [1, 2], "b": {"c": [{}]}}, {}],
        "refit": {"rows": [{}]},
    }
    write_result(tmp_path / "found.json", result)
    text = (tmp_path / "found.json").read_text()
    assert json.loads(text) == result
    assert text.splitlines()[1:6] == ['"device": "x",', '"steps": {"sft": 2},', '"rows": [',
                                      '{"a": [1, 2], "b": {"c": [{}]}},', "{}"]  # fmt: skip
    with pytest.raises(ValueError):
        write_result(tmp_path / "nan.json", {"rows": [{"a": float("nan")}]})
    assert not (tmp_path / "nan.json").exists()
