"""The experiment that decides what a language model is for, at a tiny budget."""

import json
from typing import Any

import numpy as np
import pytest

from bench.taste import LANGUAGE, NONE, RIVAL, SWAPPED, VERDICT, compare, of_another, run
from negfast.errors import InputError
from tests.bench.test_language import tiny_language_model


def test_every_arm_has_a_row_alone_and_stacked_and_what_is_trained_is_kept(tiny_data, tmp_path, monkeypatch):
    out = tmp_path / "taste.json"
    budget: dict[str, Any] = {"judgements": 40, "epochs": 1, "layers": 1, "asked": 60, "resamples": 20}
    budget |= {"seeds": "0,1", "model_seeds": "0", "runs": tmp_path / "runs"}
    budget |= {"out": out, "data": tiny_data, "model": tiny_language_model(tmp_path / "model")}
    for context in ("event", "day"):
        run(context=context, **budget)
    entries = json.loads(out.read_text())["entries"]
    assert [entry["context"] for entry in entries] == ["event", "day"]
    names = {"boosted", RIVAL, VERDICT, *(LANGUAGE + end for end in ("", NONE, SWAPPED))}
    for entry in entries:
        rows = {row["name"]: row for row in entry["rows"]}
        assert set(rows) == names and entry["test"] >= 60 and 0 < entry["with_another"] <= 1
        for name, row in rows.items():
            assert 0 < row["auc"]["mean"] < 1 and ("stacked_auc" in row) == (name != RIVAL)
            assert row["auc"]["mean"] == pytest.approx(np.mean(row["by_seed"]))
            assert len(row["by_seed"]) == (1 if name.startswith(LANGUAGE) else 2)
        assert rows[VERDICT]["stacked_minus_verdict"]["mean"] == 0
        assert len({rows[LANGUAGE + end]["auc"]["mean"] for end in ("", NONE, SWAPPED)}) == 3
    monkeypatch.setattr("bench.taste.fine_tuned", None)
    assert run(context="day", **budget)["entries"] == entries


def test_data_is_needed(tmp_path):
    with pytest.raises(InputError, match="expected --data"):
        run(tmp_path / "taste.json")


def test_an_arm_that_knows_the_label_is_above_the_rival_and_noise_is_not():
    rng = np.random.default_rng(0)
    labels = [rng.random(600) < 0.3 for _ in range(2)]
    rival = [label + rng.normal(size=600) for label in labels]
    scores: list[dict[str, list[np.ndarray]]] = [
        {
            RIVAL: rival,
            VERDICT: rival,
            "oracle": [label + 0.0 for label in labels],
            "noise": [rng.normal(size=600) for _ in labels],
        }
        for _ in range(2)
    ]
    rows = {row["name"]: row for row in compare(scores, labels, np.arange(600) % 50, 200)}
    assert rows["oracle"]["auc"]["mean"] == 1 and rows["oracle"]["stacked_minus_rival"]["low"] > 0
    assert rows["noise"]["minus_rival"]["high"] < 0 and abs(rows["noise"]["stacked_minus_rival"]["mean"]) < 0.02


def test_another_history_is_of_another_user_s_question_on_the_same_item():
    user = np.array([0, 1, 2, 3, 4, 5, 6, 6])
    item = np.array([3, 1, 3, 1, 3, 2, 5, 5])
    other = of_another(user, item, np.random.default_rng(0))
    assert np.array_equal(item[other], item)
    assert (user[other[:5]] != user[:5]).all() and sorted(other[:5].tolist()) == list(range(5))
    assert other[5:].tolist() == [5, 6, 7]  # nobody else was asked
