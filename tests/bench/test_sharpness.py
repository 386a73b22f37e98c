"""Policies of equal entropy: entropies as every item's probability gives them, and temperatures at which they agree."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench.experiments import sharpness
from bench.experiments.prior_weight import with_weight
from negfast.evaluate.sets import evaluation_set
from negfast.model.prompts import MIXED
from negfast.runtime.run_folder import RunFolder
from negfast.sid.prior import NEXT_DISLIKE
from tests.model.all_items import all_item_log_probs


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_entropy_is_that_of_all_items(tiny_run: Path, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharpness, "WALKS", 256)
    engine = RunFolder(tiny_run).finished_engine(None)
    torch.nn.init.normal_(engine.policy.block.head.weight, std=0.2)  # codes speak as loudly as the prior
    engine = with_weight(engine, 1 / temperature, 1 / temperature)
    requests = evaluation_set(engine.log, engine.split, "valid").requests.take(np.arange(30))
    batch = engine.prompts.build(requests.user, requests.day, MIXED, 0, tail="next-dislike")
    parts = (engine.policy, engine.chooser, batch.layout, batch.tokens, batch.prior, NEXT_DISLIKE)
    log_p = all_item_log_probs(*parts).double().numpy()
    exact = -(np.exp(log_p) * np.where(np.isfinite(log_p), log_p, 0.0)).sum(1).mean()
    assert sharpness.mean_entropy(engine, requests) == pytest.approx(exact, rel=0.01)


def test_rivals_are_sharpened_to_the_entropy_of_grpo(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sharpness.json"
    arguments = [str(tiny_run), "--long", str(tiny_run), "--resamples", "10", "--out", str(out)]
    CliRunner().invoke(sharpness.main, arguments, catch_exceptions=False)
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["grpo", *(f"{n}{s}" for n in ("prior", "sft", "sft-long") for s in ("", ", sharpened"))]
    for name in ("prior", "sft", "sft-long"):
        assert abs(rows[f"{name}, sharpened"]["entropy"] - rows["grpo"]["entropy"]) < sharpness.NEAR
        assert rows[name]["temperature"] == 1.0
    assert rows["sft"] | {"name": ""} == rows["sft-long"] | {"name": ""}  # the same weights here
    differences = {(d["b"], d["metric"]): d["mean"] for d in found["differences"]}
    for name in rows.keys() - {"grpo"}:
        for metric in ("nll", "mean_reward"):
            gap = rows["grpo"][metric]["mean"] - rows[name][metric]["mean"]
            assert differences[name, metric] == pytest.approx(gap)


@pytest.mark.parametrize("target", [1.5, 2.9, 3.0, 3.3])
def test_temperatures_are_found_on_either_side_of_one(target: float) -> None:
    found = sharpness.matched(lambda temperature: 3 + np.log(temperature), target)
    assert 3 + np.log(found) == pytest.approx(target, abs=sharpness.NEAR)


def test_every_run_has_its_long_one(tmp_path: Path) -> None:
    found = CliRunner().invoke(sharpness.main, ["one", "two", "--long", "other"])
    assert found.exit_code == 2 and "expected one for each of the 2 runs" in found.output
