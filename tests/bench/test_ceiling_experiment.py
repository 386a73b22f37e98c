"""The ceiling's estimates recover what a simulated log was made of, and the oracles see what rankers cannot."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from bench.experiments import ceiling
from bench.experiments.ceiling import liability_auc, main, tetrachoric


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_share_of_a_group_is_recovered(share: float) -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 4000, 40_000)
    liability = rng.normal(size=4000)[group] * np.sqrt(share) + rng.normal(size=len(group)) * np.sqrt(1 - share)
    assert tetrachoric(group, liability > norm.isf(0.2)) == pytest.approx(share, abs=0.03)


def test_auc_grows_from_chance_to_one_with_what_is_known() -> None:
    aucs = [liability_auc(np.full(20_000, known), 0.15) for known in (0.0, 0.3, 0.6, 1.0)]
    assert aucs[0] == pytest.approx(0.5, abs=0.01) and aucs[-1] == 1.0
    assert aucs == sorted(aucs)
    rng = np.random.default_rng(1)  # by a simulation of its own
    part = rng.normal(size=20_000) * np.sqrt(0.3)
    bad = part + rng.normal(size=len(part)) * np.sqrt(0.7) > norm.isf(0.15)
    wins = (part[bad][:, None] > part[~bad][None, :2000]).mean()
    assert aucs[1] == pytest.approx(wins, abs=0.01)


def test_effects_see_what_the_score_does_not_and_no_label_of_their_own_fold() -> None:
    rng = np.random.default_rng(2)
    user, folds = rng.integers(0, 50, 3000), rng.integers(0, 5, 3000)
    score = np.full(3000, 0.3) + 1e-3 * rng.random(3000)
    told = rng.random(3000) < np.where(user % 2, 0.6, 0.05)
    assert roc_auc_score(told, ceiling._with_effects(score, ceiling._indicators(user), told, folds)) > 0.75
    noise = rng.random(3000) < 0.3
    own = ceiling._indicators(np.arange(3000))  # an effect of its own for every event would know its label
    assert roc_auc_score(noise, ceiling._with_effects(score, own, noise, folds)) < 0.55


def test_every_estimate_is_written(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "ceiling.json"
    command = ["--data", str(tiny_data), "--resamples", "10", "--out", str(out)]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    found = json.loads(out.read_text())
    auc = {row["name"]: row["filter_auc"]["mean"] for row in found["oracles"]}
    assert next(iter(auc)) == "boosted-plus, fitted before T_valid" and len(auc) == 5
    assert all(0.6 < value < 1 for value in auc.values())
    assert {d["b"] for d in found["differences"]} == {"boosted-plus, fitted before T_valid"}
    shares = found["liability"]
    assert 0 < shares["share of users' genres"] < 1  # tiny users hate a genre
    known = [shares[f"AUC, {name}"] for name in ("user and item as histories tell", "user and item known")]
    assert known[0] <= known[1] <= shares["AUC, user, item and genre taste known"]
