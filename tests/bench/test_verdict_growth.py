"""More days to learn from: what is fitted, on which events, and that figures of rows belong together."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

from bench.experiments import verdict_growth
from negfast.data.dataset import Dataset
from negfast.evaluate.sets import evaluation_set


def test_rows_by_the_end_of_what_is_learned_from(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict_growth, "MONTH", 3)
    monkeypatch.setattr(verdict_growth, "SEEDS", (0, 1))
    out = tmp_path / "growth.json"
    arguments = ["--data", str(tiny_data), "--resamples", "10", "--out", str(out)]
    CliRunner().invoke(verdict_growth.main, arguments, catch_exceptions=False)
    rows = json.loads(out.read_text())["rows"]
    dataset = Dataset.open(tiny_data)
    ends = [6, 3, 0, 0, dataset.valid_day - dataset.test_day]
    assert [row["learned_until_days_before_T_valid"] for row in rows] == ends
    assert [row["split"] for row in rows] == ["valid"] * 3 + ["test"] * 2
    assert rows[0]["events"] < rows[1]["events"] < rows[2]["events"] == rows[3]["events"] < rows[4]["events"]
    assert rows[0]["minus_before"] == rows[3]["minus_before"] == {}
    gained = rows[4]["minus_before"]["boosted-plus"]["mean"]
    assert gained == pytest.approx(rows[4]["boosted-plus"]["mean"] - rows[3]["boosted-plus"]["mean"])
    assert len(set(rows[2]["by_seed"])) == 2


def test_the_auc_is_that_of_all_events(tiny_data: Path) -> None:
    dataset = Dataset.open(tiny_data)
    evalset = evaluation_set(dataset.log, dataset.split(), "valid")
    score = np.random.default_rng().normal(size=len(evalset.filter_dislike))
    expected = roc_auc_score(evalset.filter_dislike, score)
    assert verdict_growth.auc_samples(evalset, score, 5)[0] == pytest.approx(expected)
