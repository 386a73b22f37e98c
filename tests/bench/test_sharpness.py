"""GRPO against SFT of its entropy, on a small data set."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.experiments.sharpness import METRICS, Measured, entropy, main
from bench.runs import trained_stages
from negfast.errors import InputError
from negfast.train.expected import item_log_probs
from tests.tiny import SETTINGS

OVERRIDES = tuple(f"{key}={value}" for key, value in SETTINGS.items() if not key.startswith(("align.", "train.")))


@pytest.fixture(scope="module")
def measured(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, Path]:
    settings = ("train.seed=0", "train.threads=1", "align.steps=0", *OVERRIDES)
    run, engine = trained_stages(tmp_path_factory.mktemp("sharpness") / "run", tiny_data, settings)
    return Measured(engine, "valid", 40), run.checkpoints / "sft"


def test_entropy_is_that_of_the_items(measured: tuple[Measured, Path]) -> None:
    """Against the exact sum over a request's unseen items."""
    found, sft = measured
    engine, asked = found.at(sft, 0.7), found.walked
    log, items, offsets = engine.log, [], [0]
    for user, day in zip(asked.user, asked.day, strict=True):
        mine = slice(*log.user_offsets[user : user + 2])
        seen = log.item[mine][log.day[mine] <= day]
        items.append(np.setdiff1d(np.arange(log.n_items, dtype=np.int32), seen))
        offsets.append(offsets[-1] + len(items[-1]))
    [log_p] = item_log_probs(engine, asked.user, asked.day, np.array(offsets), np.concatenate(items))
    p = np.exp(log_p)
    assert np.isclose(p.sum(), len(asked), rtol=1e-5)
    assert np.isclose(entropy(engine, asked), -(p * log_p).sum() / len(asked), rtol=0.02)


def test_a_temperature_is_found_again(measured: tuple[Measured, Path]) -> None:
    found, sft = measured
    sharp = entropy(found.at(sft, 0.75), found.walked)
    assert sharp < entropy(found.at(sft, 1.0), found.walked)
    assert np.isclose(found.temperature(sft, sharp), 0.75, rtol=0.02)
    with pytest.raises(InputError, match=r"entropy: found 99\.000 nats"):
        found.temperature(sft, 99.0)


def test_rows_and_differences(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["--data", str(tiny_data), "--runs", str(tmp_path / "runs"), "--seeds", "0", "--out", str(out)]
    command += ["--requests", "30", "--resamples", "20", "--set", "train.threads=1", "--set", "grpo.lr=0.01"]
    for override in OVERRIDES:
        command += ["--set", override]
    for split in ("valid", "test"):  # the second reads the runs of the first
        result = CliRunner().invoke(main, [*command, "--split", split], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert set(results) == {"valid", "test"}
    for found in results.values():
        rows = {row["name"]: row for row in found["rows"]}
        grpo, sft, sharpened = (rows[name] for name in ("grpo", "sft", "sft, sharpened"))
        assert np.isclose(sharpened["entropy"], grpo["entropy"], rtol=0.01) and grpo["entropy"] != sft["entropy"]
        assert sharpened["temperature"] != 1.0 and sft["by_seed"]["nll"] == [sft["nll"]["mean"]]
        long, long_sharpened = rows["sft, as long"], rows["sft, as long, sharpened"]
        assert np.isclose(long_sharpened["entropy"], grpo["entropy"], rtol=0.01) and long["nll"] != sft["nll"]
        by_pair = {(d["b"], d["metric"]): d["mean"] for d in found["differences"]}
        for metric in METRICS:
            assert np.isclose(by_pair["sft", metric], grpo[metric]["mean"] - sft[metric]["mean"], atol=1e-12)
    steps = [json.loads(line) for line in (tmp_path / "runs" / "seed-0" / "metrics.jsonl").open()]
    assert [line["stage"] for line in steps] == ["sft"] * SETTINGS["sft.steps"] + ["grpo"] * SETTINGS["grpo.steps"]
    steps = [json.loads(line) for line in (tmp_path / "runs" / "long-0" / "metrics.jsonl").open()]
    assert [line["stage"] for line in steps] == ["sft"] * results["test"]["long_steps"]
    assert results["test"]["long_steps"] == results["valid"]["long_steps"] > SETTINGS["sft.steps"]
