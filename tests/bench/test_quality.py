"""The final table on a small data set: rows are means over seeds, differences are paired, runs are found again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.experiments.ablations import ABLATIONS, GRPO_ONLY, branch
from bench.quality import METRICS, compared, grpo_minus_sft, mean_reward, run, table_rows
from bench.runs import trained
from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.errors import InputError
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.report import HEADLINE, metric_samples, paired_differences
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.run_folder import RunFolder
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


def random_answers(evalset: EvalSet, seed: int) -> Predictions:
    rng = np.random.default_rng(seed)
    return Predictions(
        filter_score=rng.random(len(evalset.filter_user)),
        filter_is_probability=True,
        pool_score=rng.random(evalset.pool_items.shape),
    )


def test_a_row_is_the_mean_over_seeds_under_the_same_resamples(evalset: EvalSet) -> None:
    predictions = {"boosted": replace(random_answers(evalset, 0), kind="baseline")}
    predictions |= {f"sft#{seed}": random_answers(evalset, seed) for seed in (1, 2, 3)}
    samples = metric_samples(evalset, predictions, resamples=40)
    rows, averaged = table_rows(evalset, predictions, samples)
    assert [row["name"] for row in rows] == ["boosted", "sft"]
    sft = rows[1]
    by_seed = [samples[f"sft#{seed}"]["filter_auc"][0] for seed in (1, 2, 3)]
    assert sft["by_seed"]["filter_auc"] == by_seed and "by_seed" not in rows[0]
    assert sft["filter_auc"]["mean"] == pytest.approx(np.mean(by_seed))
    assert sum(b["events"] for b in sft["filter_reliability"]) == 3 * len(evalset.filter_user)
    width = {name: row["filter_auc"]["high"] - row["filter_auc"]["low"] for name, row in zip("ab", rows, strict=True)}
    assert width["b"] < width["a"]  # three random scores vary less than one
    assert compared(averaged) == [("sft", "boosted")]
    (difference,) = paired_differences(averaged, compared(averaged), ("filter_auc",))
    assert difference["mean"] == pytest.approx(np.mean(by_seed) - rows[0]["filter_auc"]["mean"])


def test_grpo_minus_sft_is_a_seed_each(evalset: EvalSet) -> None:
    predictions = {f"{name}#{seed}": random_answers(evalset, seed) for seed in (0, 1) for name in ("sft", "grpo")}
    predictions["grpo#1"] = random_answers(evalset, 9)
    samples = metric_samples(evalset, predictions, resamples=20)
    for part in samples.values():
        part |= {metric: part["filter_auc"] for metric in HEADLINE if metric not in part}
    first, second = grpo_minus_sft([0, 1], samples, {"sft": [0.25, 0.5], "grpo": [0.5, 0.25], "sft-long": []})
    assert (first["seed"], first["reward"], first["filter_auc"]["mean"]) == (0, 0.25, 0.0)
    assert second["reward"] == -0.25 and second["reward_grpo"] == 0.25
    expected = samples["grpo#1"]["filter_auc"][0] - samples["sft#1"]["filter_auc"][0]
    assert second["filter_auc"]["mean"] == pytest.approx(expected) and expected != 0
    assert "vs_long_reward" not in first


def test_the_table_of_finished_runs(tiny_run: Path, tmp_path: Path) -> None:
    """Finds a run that is there, evaluates it, and writes the shape of the result."""
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "seed-0").symlink_to(tiny_run)
    settings = toml(tmp_path)
    before = (tiny_run / "metrics.jsonl").read_bytes()
    result = run(tmp_path / "quality.json", "0", runs, settings, "smoke", None, None, "valid", "no", 20)
    assert json.loads((tmp_path / "quality.json").read_text()) == result
    assert (tiny_run / "metrics.jsonl").read_bytes() == before
    assert result["split"] == "valid" and result["seeds"] == [0]
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[-3:] == ["prior", "sft", "grpo"] and rows["grpo"]["kind"] == "model"
    assert {"boosted", "item-rate", "decay-4d"} <= set(rows)
    pairs = {(d["a"], d["b"], d["metric"]) for d in result["differences"]}
    assert {("grpo", "sft", "filter_auc"), ("sft", "boosted", "filter_auc"), ("sft", "decay-4d", "FHR@20")} <= pairs
    assert {metric for _, _, metric in pairs} <= set(METRICS)
    (entry,) = result["grpo_minus_sft"]
    assert entry["reward"] == pytest.approx(entry["reward_grpo"] - entry["reward_sft"])


def test_mean_reward_is_that_of_the_items_sampled(tiny_run: Path) -> None:
    """With nothing but hits in the reward, it lies between none and all, and a like penalty lowers it."""
    engine = RunFolder(tiny_run).finished_engine(None)
    requests = engine.split.valid.take(engine.split.valid.has_dislikes)
    plain = replace(engine.config.reward, collab_weight=0.0, like_penalty=0.0)
    hits = mean_reward(engine, requests, plain)
    assert 0 < hits < 1
    assert mean_reward(engine, requests, plain) == hits
    assert mean_reward(engine, requests, replace(plain, like_penalty=0.5)) < hits
    assert mean_reward(engine, requests, replace(plain, collab_weight=0.2)) > hits


def test_a_run_with_other_settings_is_not_taken_for_it(tiny_run: Path, tmp_path: Path) -> None:
    settings = toml(tmp_path)
    assert trained(tiny_run, settings, "smoke", None, ()).path == tiny_run
    with pytest.raises(InputError, match="other settings"):
        trained(tiny_run, settings, "smoke", None, ("grpo.group=6",))


def test_a_branch_goes_on_from_sft_alone(tiny_run: Path, tmp_path: Path) -> None:
    default, folder = RunFolder(tiny_run), tmp_path / "no-collaborative-term"
    overrides = ABLATIONS["no-collaborative-term"]
    assert all(key.startswith(GRPO_ONLY) for key in overrides)
    settings = load_config(toml(tmp_path), "smoke", overrides)
    branch(default, folder, settings)
    found = trained(folder, toml(tmp_path), "smoke", default.data, overrides)
    assert found.config.reward.collab_weight == 0
    stages = [json.loads(line)["stage"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["grpo"] * SETTINGS["grpo.steps"]
    assert not found.report.exists()  # the test split was left alone
    weights = [(path / "checkpoints" / "sft" / "policy.safetensors").read_bytes() for path in (tiny_run, folder)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_a_setting(name: str) -> None:
    assert load_config(None, "quickstart", ABLATIONS[name]) != load_config(None, "quickstart", ())
