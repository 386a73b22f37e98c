"""Other weights of the prior: what they change, and that the run's own is found again."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from bench.experiments.prior_weight import WEIGHTS, main, nll, with_weight
from negfast.evaluate.sets import evaluation_set
from negfast.runtime.run_folder import RunFolder


def test_rows_of_the_prior_and_of_the_model_by_weight(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior_weight.json"
    CliRunner().invoke(main, [str(tiny_run), "--resamples", "10", "--out", str(out)], catch_exceptions=False)
    found = json.loads(out.read_text())
    assert [row["weight"] for row in found["model"]] == list(WEIGHTS)
    assert [row["weight"] for row in found["prior"]] == list(WEIGHTS[1:])
    for name in ("prior", "model"):
        rows = {row["weight"]: row for row in found[name]}
        assert {value["mean"] for value in rows[found["trained_with"]]["minus_own"].values()} == {0.0}
        least = min(rows.values(), key=lambda row: row["nll of train futures"]["mean"])
        assert found[f"{name} learned"] == least["weight"]
        assert rows[0.5]["nll of valid futures"] != rows[1.5]["nll of valid futures"]


def test_other_weights_answer_otherwise_and_the_own_ones_as_before(tiny_run: Path) -> None:
    engine = RunFolder(tiny_run).finished_engine(None)
    requests = evaluation_set(engine.log, engine.split, "valid").requests
    scale = engine.policy.block.scale.item()
    before = nll(engine, requests)
    flat = nll(with_weight(engine, 0.0, 0.0), requests)
    offsets = requests.dislike_offsets
    assert before.shape == flat.shape == (len(offsets) - 1,) and not np.allclose(before, flat)
    np.testing.assert_array_equal(nll(with_weight(engine, engine.config.prior.weight, scale), requests), before)
