"""The page's tables come from the results: what is between the markers is replaced, nothing else."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.experiments.semantic_id_runs import METRICS
from bench.experiments.tables import PAGE, RESULTS, TABLES, main, written

HALF = {"mean": 0.5, "low": 0.25, "high": 0.75}


def difference(**keys: object) -> dict:
    return {"mean": 0.0052, "low": 0.0021, "high": 0.0084} | keys


def quality() -> dict:
    row = {"name": "boosted", "kind": "baseline", "filter_auc": HALF, "filter_auc/cold": HALF}
    model = {"name": "grpo", "kind": "model", "filter_auc": HALF | {"mean": 0.8024}, "filter_reduction": HALF}
    missing = {"mean": None, "low": None, "high": None}
    return {
        "rows": [row | {"FHR@20": missing}, model],
        "differences": [
            difference(a="grpo", b="boosted", metric="filter_auc"),
            difference(a="grpo", b="boosted", metric="FHR@20", low=-0.001),
        ],
        "grpo_minus_sft": [{"seed": 3, "filter_auc": HALF, "vs_long_filter_auc": HALF | {"low": -0.1}}],
        "refit": {"rows": [model], "minus_frozen": [difference(name="grpo", metric="filter_auc")]},
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "quality.json").write_text(json.dumps(quality()))
    return folder


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_tables_of_the_final_result(results: Path) -> None:
    rows = cells(written("main", results))
    assert [row[0] for row in rows] == ["", "---", "`boosted`", "`grpo`"]
    place = rows[0].index("filter AUC")
    assert (rows[2][place], rows[3][place]) == (".5000", "**.8024**")
    assert rows[2][rows[0].index("FHR@20")] == "" and rows[3][rows[0].index("reduction %")] == "**50.0**"
    rows = cells(written("differences", results))
    assert rows[2][0] == "`boosted`" and rows[2][place] == "**+.0052** [+.0021, +.0084]"
    assert rows[2][rows[0].index("FHR@20")] == "+.005 [-.001, +.008]"  # not clear of zero
    assert [row[:2] for row in cells(written("seeds", results))[2:]] == [["`sft`", "3"], ["`sft-long`", "3"]]
    assert ".5000" in cells(written("strata", results))[2]
    assert "**+.0052** [+.0021, +.0084]" in written("refit", results)
    (results / "quality.json").write_text(json.dumps({key: v for key, v in quality().items() if key != "refit"}))
    assert "Not measured yet" in written("refit", results)


def test_ablations_and_likes(results: Path) -> None:
    found = [difference(a=a, b=f"default {a}", metric="filter_auc") for a in ("sft", "grpo")]
    figures = {metric: HALF for metric in ("mean_reward", "FHR@20", "filter_auc", "pool_auc")}
    stages = {stage: figures for stage in ("sft", "grpo")}
    rows = {
        f"{name}-0": {"name": name, "seed": 0, "changed": changed, **stages, "differences": found}
        for name, changed in (("default", []), ("no-likes", ["prompt.like_cap=0"]))
    }
    steps = {"align": 1, "sft": 2, "grpo": 3}
    (results / "ablations.json").write_text(json.dumps({"steps": steps, "rows": rows}))
    made = written("ablations", results)
    assert "Steps of every run: align 1, sft 2, grpo 3." in made and "`prompt.like_cap=0`" in made
    assert made.count("**+.0052** [+.0021, +.0084]") == 2  # of both stages, not of the default
    part = {name: HALF for name in ("nll", "mean_reward", "filter_auc")}
    likes = {"trained_with": 50, "rows": [{"likes_shown": shown, "minus_none": part} for shown in (0, 50)]}
    likes["by_history"] = [{"likes": [51, None], "requests": 1200, "events": 7, "minus_none": part}]
    (results / "likes.json").write_text(json.dumps(likes))
    made = written("likes", results)
    assert "| 51 or more | 1,200 | 7 |" in made and "at most 50 of them shown" in made


def test_prior_weights_beside_the_own_one(results: Path) -> None:
    minus = {key: HALF for key in ("nll of train futures", "nll of valid futures", "mean reward")}
    rows = [{"weight": weight, **minus, "minus_own": minus} for weight in (0.5, 1.0)]
    result = {"trained_with": 1.0, "prior": rows, "model": rows, "prior learned": 0.5, "model learned": 1.0}
    (results / "prior_weight.json").write_text(json.dumps(result))
    made = written("prior-weight", results)
    figures = ["**+.500** [+.250, +.750]", "**+.500** [+.250, +.750]", "**+.50000** [+.25000, +.75000]"]
    assert cells(made)[2:] == [["prior", "0.5", *figures], ["model", "0.5", *figures]]
    assert "With 1.0: prior nll, train .500, nll, valid .500, mean reward .50000; model" in made
    assert "Likeliest on train futures: prior 0.5, model 1.0." in made


def test_verdicts_by_how_far_they_learned(results: Path) -> None:
    names = ("verdict's prior", "boosted-plus", "mean of both")
    row = {"split": "valid", "events": 13164, **{name: HALF for name in names}}
    rows = [
        {**row, "learned_until_days_before_T_valid": days, "minus_before": before}
        for days, before in ((31, {}), (0, {name: difference() for name in names}), (-28, {}))
    ]
    (results / "verdict_growth.json").write_text(json.dumps({"rows": rows}))
    shown = cells(written("verdict-growth", results))[2:]
    assert [line[1] for line in shown] == ["31 days before", "T_valid", "T_test"]
    assert shown[0] == ["valid", "31 days before", "13,164", *[".5000"] * 3, "", "", ""]
    assert shown[1][6] == "**+.0052** [+.0021, +.0084]"


def test_policies_of_equal_entropy(results: Path) -> None:
    row = {"temperature": 0.71, "entropy": 5.5, "nll": HALF, "mean_reward": HALF}
    rows = [{"name": name, **row} for name in ("grpo", "sft, sharpened")]
    below = [difference(a="grpo", b="sft, sharpened", metric="mean_reward")]
    (results / "sharpness.json").write_text(json.dumps({"runs": 3, "rows": rows, "differences": below}))
    made = written("sharpness", results)
    assert cells(made)[3] == ["sft, sharpened", ".71", "5.50", ".500", ".50000", "", "**+.00520** [+.00210, +.00840]"]
    assert "Means over runs: 3." in made


def test_policies_on_other_semantic_ids_and_of_a_language_model(results: Path) -> None:
    row = {metric: HALF for metric in METRICS}
    below = [difference(a="random", b="rq-kmeans", metric=metric) for metric in METRICS]
    found = {"settings": ["sft.steps=3"], "seeds": [0, 1], "differences": below}
    found["rows"] = [{"quantizer": name, **row} for name in ("rq-kmeans", "random")]
    (results / "semantic_ids.json").write_text(json.dumps({"rows": [], "downstream": found}))
    made = written("semantic-ids", results)
    assert cells(made)[0] == ["", "nll of F", "FHR@20", "filter AUC", "filter AUC, cold item", "pool AUC"]
    assert cells(made)[2] == ["rq-kmeans", ".500", ".500", ".5000", ".5000", ".5000"]
    assert cells(made)[4][:2] == ["random minus rq-kmeans", "**+.005** [+.002, +.008]"]
    assert "Settings: `sft.steps=3`; seeds 0, 1." in made
    (results / "semantic_ids.json").write_text(json.dumps({"rows": []}))
    assert "Not measured yet" in written("semantic-ids", results)
    pairs = [difference(a="language sft", b="small sft", metric="nll")]
    rows = [{"name": f"{model} sft", **row} for model in ("small", "language")]
    about = {"share": 0.1, "steps": {"align": 4, "sft": 2}}
    (results / "language_model.json").write_text(json.dumps({**about, "rows": rows, "differences": pairs}))
    made = written("language-model", results)
    assert "Steps: align 4, sft 2; 10% of valid's users." in made
    assert cells(made)[4] == ["language sft minus small sft", "**+.005** [+.002, +.008]", "", "", "", ""]


def test_titles_and_true_dislikes(results: Path) -> None:
    keys = ("level1", "level1_top10", "level1_chance", "train_level1", "item", "train_item")
    learned = {f"title_sid_{key}": 0.25 for key in keys}
    (results / "alignment.json").write_text(json.dumps({"rows": [{"steps": 60, "epochs": 0.61, **learned}]}))
    assert cells(written("alignment", results))[2] == ["60", ".6", *[".250"] * 6]
    found = {"steps": 9, "seeds": [0], "requests": 5, "window/true_probability": HALF}
    found["window-next/true_probability"] = HALF
    (results / "simulator.json").write_text(json.dumps({"recovery": found}))
    made = written("recovery", results)
    assert ["window", ".500", "", ""] in cells(made) and "9 steps of SFT, seeds 0, 5 requests." in made
    assert ["window minus next", "**+.500** [+.250, +.750]", "", ""] in cells(made)


def test_the_page_keeps_all_else(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n<!-- table: main -->\nold\n<!-- end -->\ntext\n<!-- table: likes -->\n<!-- end -->\nmore\n"
    )
    command = ["--page", str(page), "--results", str(results)]
    assert CliRunner().invoke(main, command).exit_code == 0
    text = page.read_text()
    assert text.startswith("# Title\n<!-- table: main -->\n| ") and "old" not in text
    assert "\ntext\n" in text and text.endswith("\nmore\n")
    assert "Not measured yet: `python -m bench.experiments.likes RUN`" in text
    CliRunner().invoke(main, command)
    assert page.read_text() == text
    page.write_text("<!-- table: nonsense -->\n<!-- end -->\n")
    assert "unknown tables nonsense" in CliRunner().invoke(main, command).output


def test_the_page_says_what_the_results_say() -> None:
    """docs/results.md is what the command makes of bench/results."""
    text = PAGE.read_text()
    for name in TABLES:
        start = f"<!-- table: {name} -->\n"
        assert start in text, f"docs/results.md shows no table {name}"
        shown = text.split(start)[1].split("<!-- end -->")[0]
        assert shown == written(name, RESULTS), f"run python -m bench.experiments.tables: {name} has drifted"
