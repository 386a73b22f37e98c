"""The final table on a small data set: rows are means over seeds, differences are paired, runs are found again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.predictions import predictions_of
from bench.quality import METRICS, SHOWN, compared, equal_compute, grpo_minus_sft, run, table_rows
from bench.runs import branch, trained
from negfast.config import Reward, load_config
from negfast.data.dataset import Dataset
from negfast.errors import InputError
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.evaluate.table import metric_samples, paired_differences
from negfast.runtime.run_folder import RunFolder
from tests.tiny import SETTINGS


def toml(folder: Path) -> Path:
    """The settings of the tiny run as a file."""
    lines = [f"{key} = {value}" for key, value in SETTINGS.items()]
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def evalset(tiny_data: Path) -> EvalSet:
    data = Dataset.open(tiny_data)
    return evaluation_set(data.log, data.split(), "valid")


def random_predictions(evalset: EvalSet, seed: int) -> Predictions:
    rng = np.random.default_rng(seed)
    return Predictions(
        filter_score=rng.random(len(evalset.filter_user)),
        filter_is_probability=True,
        pool_score=rng.random(evalset.pool_items.shape),
        expected_reward=rng.random(len(evalset.requests)),
    )


def test_a_row_is_the_mean_over_seeds_under_the_same_resamples(evalset: EvalSet) -> None:
    predictions = {"boosted": replace(random_predictions(evalset, 0), kind="baseline")}
    predictions |= {f"sft#{seed}": random_predictions(evalset, seed) for seed in (1, 2, 3)}
    samples = metric_samples(evalset, predictions, resamples=40)
    rows, averaged = table_rows(predictions, samples)
    assert [row["name"] for row in rows] == ["boosted", "sft"]
    sft = rows[1]
    by_seed = [samples[f"sft#{seed}"]["filter_auc"][0] for seed in (1, 2, 3)]
    assert sft["by_seed"]["filter_auc"] == by_seed and "by_seed" not in rows[0]
    assert sft["filter_auc"]["mean"] == pytest.approx(np.mean(by_seed))
    width = {name: row["filter_auc"]["high"] - row["filter_auc"]["low"] for name, row in zip("ab", rows, strict=True)}
    assert width["b"] < width["a"]  # three random scores vary less than one
    assert compared(averaged | {"grpo": averaged["sft"]}) == [("grpo", "boosted"), ("grpo", "sft")]
    (difference,) = paired_differences(averaged, [("sft", "boosted")], ("filter_auc",))
    assert difference["mean"] == pytest.approx(np.mean(by_seed) - rows[0]["filter_auc"]["mean"])


def test_grpo_minus_sft_is_a_seed_each(evalset: EvalSet) -> None:
    predictions = {f"{name}#{seed}": random_predictions(evalset, seed) for seed in (0, 1) for name in ("sft", "grpo")}
    predictions["grpo#1"] = predictions["sft-long#1"] = random_predictions(evalset, 9)
    samples = metric_samples(evalset, predictions, resamples=20)
    first, second = grpo_minus_sft([0, 1], samples)
    assert (first["seed"], first["mean_reward"]["mean"], first["filter_auc"]["mean"]) == (0, 0.0, 0.0)
    for metric in ("filter_auc", "mean_reward"):
        expected = samples["grpo#1"][metric] - samples["sft#1"][metric]
        assert second[metric]["mean"] == pytest.approx(expected[0]) and expected[0] != 0
        assert second[metric]["low"] <= second[metric]["mean"] <= second[metric]["high"]
    assert second["vs_long_filter_auc"]["mean"] == 0 and "vs_long_filter_auc" not in first


def test_the_table_of_finished_runs(tiny_run: Path, tmp_path: Path) -> None:
    """Finds a run that is there, trains the longer SFT and the refit, and writes the shape of the result."""
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "seed-0").symlink_to(tiny_run)
    settings = toml(tmp_path)
    before = (tiny_run / "metrics.jsonl").read_bytes()
    out = tmp_path / "quality.json"
    result = run(out, "0", runs, settings, "smoke", None, "test", True, True, True, False, 20)
    assert json.loads(out.read_text()) == result
    assert (tiny_run / "metrics.jsonl").read_bytes() == before
    assert (result["split"], result["seeds"], result["frozen_at"]) == ("test", [0], "valid")
    rows = {row["name"]: row for row in result["rows"]}
    models = ["sft-no-align", "grpo-no-align", "sft", "grpo", "sft-long"]
    assert list(rows)[-6:] == ["prior", *models] and rows["grpo"]["kind"] == "model"
    assert {"boosted", "item-rate", "decay-4d"} <= set(rows)
    assert all(rows[name]["mean_reward"]["mean"] is not None for name in ("prior", *models))
    pairs = {(d["a"], d["b"], d["metric"]) for d in result["differences"]}
    assert {("grpo", "sft", "mean_reward"), ("grpo", "boosted", "filter_auc"), ("grpo", "decay-4d", "FHR@20")} <= pairs
    assert {metric for _, _, metric in pairs} <= set(METRICS)
    assert set(SHOWN) <= set(rows["grpo"]) and set(rows["grpo"]["by_seed"]) == set(METRICS)
    (entry,) = result["grpo_minus_sft"]
    means = [rows[name]["mean_reward"]["mean"] for name in ("grpo", "sft", "sft-long")]
    assert entry["mean_reward"]["mean"] == pytest.approx(means[0] - means[1])
    assert entry["vs_long_mean_reward"]["mean"] == pytest.approx(means[0] - means[2])

    steps = equal_compute(RunFolder(tiny_run))
    assert result["sft_long_steps"] == steps > SETTINGS["sft.steps"]
    stages = [json.loads(line)["stage"] for line in (runs / "long-0" / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["sft"] * steps  # align is the finished run's
    stages = [json.loads(line)["stage"] for line in (runs / "no-align-0" / "metrics.jsonl").read_text().splitlines()]
    assert set(stages) == {"sft", "grpo"}

    again = result["refit"]
    assert again["frozen_at"] == "test"
    refit = {row["name"]: row for row in again["rows"]}
    assert set(refit) == set(rows) - {"sft-long", "sft-no-align", "grpo-no-align"}
    for name, metric in (("boosted", "filter_auc"), ("grpo", "mean_reward")):
        (gain,) = [g for g in again["minus_frozen"] if (g["name"], g["metric"]) == (name, metric)]
        assert gain["mean"] == pytest.approx(refit[name][metric]["mean"] - rows[name][metric]["mean"])
        assert gain["mean"] != 0
    assert refit["decay-4d"]["FHR@20"] == rows["decay-4d"]["FHR@20"]  # nothing is fitted


def test_predictions_are_made_once(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder = RunFolder(tiny_run)
    engine = run_folder.finished_engine(None)
    valid = evaluation_set(engine.log, engine.split, "valid")
    first = predictions_of(run_folder, ["prior", "sft", "grpo"], valid, valid, engine.config.reward)
    assert first["prior"].filter_score is None and first["grpo"].filter_threshold is not None
    monkeypatch.setattr(RunFolder, "finished_engine", None)
    again = predictions_of(run_folder, ["prior", "grpo"], valid, valid, engine.config.reward)
    for name, found in again.items():
        for field, value in vars(found).items():
            np.testing.assert_array_equal(value, getattr(first[name], field))
    with pytest.raises(TypeError):  # another reward gives other expected rewards
        predictions_of(run_folder, ["grpo"], valid, valid, Reward(like_penalty=0.7))


def test_a_run_with_other_settings_is_not_taken_for_it(tiny_run: Path, tmp_path: Path) -> None:
    settings = toml(tmp_path)
    assert trained(tiny_run, settings, "smoke", None, ()).path == tiny_run
    with pytest.raises(InputError, match="other settings"):
        trained(tiny_run, settings, "smoke", None, ("grpo.group=6",))
    with pytest.raises(InputError, match="was trained with --model None, found other"):
        trained(tiny_run, settings, "smoke", None, (), Path("other"))
    copy = shutil.copytree(RunFolder(tiny_run).data, tmp_path / "data")
    assert trained(tiny_run, settings, "smoke", copy, ()).path == tiny_run
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["split"]["horizon"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="another data set than"):
        trained(tiny_run, settings, "smoke", copy, ())


def test_a_branch_goes_on_from_what_is_behind_it(tiny_run: Path, tmp_path: Path) -> None:
    default, folder = RunFolder(tiny_run), tmp_path / "branch"
    overrides = ("reward.collab_weight=0",)
    branch(default, folder, load_config(toml(tmp_path), "smoke", overrides), ("align", "sft"))
    found = trained(folder, toml(tmp_path), "smoke", default.data, overrides)
    assert found.config.reward.collab_weight == 0
    stages = [json.loads(line)["stage"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["grpo"] * SETTINGS["grpo.steps"]
    assert not found.report.exists()  # the test split was left alone
    weights = [(path / "checkpoints" / "sft" / "policy.safetensors").read_bytes() for path in (tiny_run, folder)]
    assert weights[0] == weights[1]
