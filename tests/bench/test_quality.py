"""The final table on a small data set: rows are means over seeds, differences are paired, runs are found again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.predictions import predictions_of
from bench.quality import COLD_USER, METRICS, SHOWN, VERDICT, run, table_rows
from bench.runs import branch, equal_compute, trained
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
    (difference,) = paired_differences(averaged, [("sft", "boosted")], ("filter_auc",))
    assert difference["mean"] == pytest.approx(np.mean(by_seed) - rows[0]["filter_auc"]["mean"])


def test_the_table_of_finished_runs(tiny_run: Path, tmp_path: Path) -> None:
    """Finds a run that is there, trains those without a step, and keeps an entry a context."""
    runs = tmp_path / "runs"
    (runs / "movietweetings").mkdir(parents=True)
    (runs / "movietweetings" / "day-0").symlink_to(tiny_run)
    settings = toml(tmp_path)
    before = (tiny_run / "metrics.jsonl").read_bytes()
    out = tmp_path / "quality.json"
    run(out, None, "day", "0", False, runs, settings, "smoke", "test", False, 20)
    assert (tiny_run / "metrics.jsonl").read_bytes() == before
    data = RunFolder(tiny_run).data
    result = run(out, data, "event", "0,1", True, runs, settings, "smoke", "test", False, 20)
    assert json.loads(out.read_text()) == result
    day, event = result["entries"]
    assert (day["data"], day["filter_context"], day["seeds"]) == ("movietweetings", "day", [0])
    assert (event["data"], event["filter_context"], event["seeds"]) == (data.name, "event", [0, 1])
    rows = {row["name"]: row for row in day["rows"]}
    assert list(rows)[-4:] == ["prior", VERDICT, "sft", "grpo"] and rows["grpo"]["kind"] == "model"
    assert {"boosted", "item-rate", "decay-4d"} <= set(rows)
    assert all(rows[name]["mean_reward"]["mean"] is not None for name in ("prior", "sft", "grpo"))
    assert all(COLD_USER in rows[name] for name in ("boosted", VERDICT)) and COLD_USER not in rows["grpo"]
    pairs = {(d["a"], d["b"], d["metric"]) for d in day["differences"]}
    assert {("grpo", "sft", "mean_reward"), (VERDICT, "boosted", "filter_auc"), ("grpo", "decay-4d", "FHR@20")} <= pairs
    assert (VERDICT, "boosted-plus", "pool_hr@10") in pairs and {metric for *_, metric in pairs} <= set(METRICS)
    assert set(SHOWN) <= set(rows["grpo"]) | set(rows[VERDICT])
    assert set(rows["grpo"]["by_seed"]) | set(rows[VERDICT]["by_seed"]) == set(METRICS)
    assert "sft" not in {row["name"] for row in event["rows"]}
    assert {d["a"] for d in event["differences"]} == {VERDICT}


def test_equal_compute_is_longer_than_sft(tiny_run: Path) -> None:
    seconds: dict[str, list[float]] = {}
    for line in (tiny_run / "speed.jsonl").read_text().splitlines():
        step = json.loads(line)
        seconds.setdefault(step["stage"], []).append(step["seconds"])
    ratio = np.median(seconds["grpo"]) / np.median(seconds["sft"])
    steps = equal_compute(RunFolder(tiny_run))
    assert steps == SETTINGS["sft.steps"] + round(SETTINGS["grpo.steps"] * ratio) > SETTINGS["sft.steps"]


def test_predictions_are_made_once(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder = RunFolder(tiny_run)
    engine = run_folder.finished_engine(None)
    valid = evaluation_set(engine.log, engine.split, "valid")
    first = predictions_of(run_folder, ["prior", "sft", "grpo"], valid, engine.config.reward)
    assert all(one.generated is not None and one.expected_reward is not None for one in first.values())
    monkeypatch.setattr(RunFolder, "finished_engine", None)
    again = predictions_of(run_folder, ["prior", "grpo"], valid, engine.config.reward)
    for name, found in again.items():
        for field, value in vars(found).items():
            np.testing.assert_array_equal(value, getattr(first[name], field))
    with pytest.raises(TypeError):  # another reward gives other expected rewards
        predictions_of(run_folder, ["grpo"], valid, Reward(like_penalty=0.7))


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
