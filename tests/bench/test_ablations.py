"""Ablations on a small data set: each changes something, starts as late as it may, and is found again."""

import json
from pathlib import Path

import pytest
from click import UsageError
from click.testing import CliRunner

from bench.experiments.ablations import ABLATIONS, METRICS, main, print_row, shortened
from negfast.config import load_config
from negfast.runtime.run_folder import RunFolder
from tests.bench.test_quality import toml
from tests.tiny import SETTINGS


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_a_setting(name: str) -> None:
    assert load_config(None, "quickstart", ABLATIONS[name]) != load_config(None, "quickstart", ())


def test_a_budget_shortens_every_stage() -> None:
    default = load_config(None, "quickstart")
    short = load_config(None, "quickstart", shortened(default, 0.5))
    for stage in ("align", "sft", "grpo"):
        assert getattr(short, stage).steps == getattr(default, stage).steps // 2
        assert stage == "align" or getattr(short, stage).validate_every == getattr(short, stage).steps
    assert short.eval.valid_requests == default.eval.valid_requests // 2
    assert shortened(default, 1.0) == ()
    nightly = load_config(None, "nightly")
    assert nightly.align.steps == 0 == load_config(None, "nightly", shortened(nightly, 0.5)).align.steps
    with pytest.raises(UsageError, match=r"--budget 1\.5"):
        shortened(default, 1.5)


def test_rows_and_their_differences(tiny_run: Path, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "ablations.json"
    runs.mkdir()
    (runs / "default-0").symlink_to(tiny_run)
    data = RunFolder(tiny_run).data
    names = ["no-like-penalty", "next-only", "no-prior"]
    command = ["--runs", str(runs), "--config", str(toml(tmp_path)), "--preset", "smoke", "--data", str(data)]
    command += ["--out", str(out)]
    for name in names:
        result = CliRunner().invoke(main, [*command, "--only", name], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["steps"] == {stage: SETTINGS[f"{stage}.steps"] for stage in ("align", "sft", "grpo")}
    assert [row["name"] for row in found["rows"]][-1] == names[-1]
    rows = {row["name"]: row for row in found["rows"]}
    assert sorted(rows) == sorted(["default", *names]) and len(rows) == len(found["rows"])
    differences = rows["default"]["differences"]
    assert {d["mean"] for d in differences if d["mean"] is not None} == {0.0}
    row = rows["no-prior"]
    assert {d["metric"] for d in row["differences"]} == set(METRICS)
    assert any(d["mean"] for d in row["differences"] if d["b"] == "default sft")
    behind = {name: {line["stage"] for line in map(json.loads, (runs / f"{name}-0" / "metrics.jsonl").open())}
              for name in names}  # fmt: skip
    assert behind == {
        "no-like-penalty": {"grpo"}, "next-only": {"sft", "grpo"}, "no-prior": {"align", "sft", "grpo"},
    }  # fmt: skip
    other = CliRunner().invoke(main, [*command, "--only", "no-prior", "--budget", "0.5"])
    assert other.exit_code != 0


def test_an_undefined_difference_prints_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    undefined = {"a": "grpo", "b": "default grpo", "metric": "pool_auc", "mean": None, "low": None, "high": None}
    print_row({"name": "x", "differences": [undefined, undefined | {"mean": 0.5, "metric": "FHR@20"}]})
    assert capsys.readouterr().out.split() == ["x", "pool_auc", "-", "FHR@20", "-"]
