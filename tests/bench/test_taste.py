"""The experiment that decides what a language model is for, at a tiny budget."""

import json

import numpy as np
import pytest

from bench.taste import RIVAL, compare, of_another, run, verbalised
from negfast.data.dataset import Dataset
from negfast.errors import InputError
from negfast.sid.embed import minilm_folder
from tests.tiny import SETTINGS


@pytest.mark.skipif(minilm_folder() is None, reason="the encoder is not installed")
def test_every_arm_has_a_row_alone_and_stacked_and_seeds_stand_beside_each_other(tiny_data, tmp_path):
    sections: dict[str, list[str]] = {}
    for key, value in SETTINGS.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {value}")
    config, out = tmp_path / "tiny.toml", tmp_path / "taste.json"
    config.write_text("\n".join(f"[{name}]\n" + "\n".join(lines) for name, lines in sections.items()))
    budget = {"pairs": 32, "asked": 60, "layers": 1, "resamples": 20}
    for seed in (0, 1):
        run(out, tiny_data, tmp_path / "runs", config, "smoke", "event", seed, **budget)
    entries = json.loads(out.read_text())["entries"]
    assert [entry["seed"] for entry in entries] == [0, 1]
    names = ["boosted", RIVAL, "prior", "decoder, codes", "decoder, text"]
    names += ["MiniLM", "MiniLM, no history", "MiniLM, another's history"]
    for entry in entries:
        assert [row["name"] for row in entry["rows"]] == names and entry["test"] == 60
        for row in entry["rows"]:
            assert 0 < row["auc"]["mean"] < 1 and ("stacked_auc" in row) == (row["name"] != RIVAL)


def test_data_is_needed(tmp_path):
    with pytest.raises(InputError, match="expected --data"):
        run(tmp_path / "taste.json")


def test_an_arm_that_knows_the_label_is_above_the_rival_and_noise_is_not():
    rng = np.random.default_rng(0)
    labels = [rng.random(600) < 0.3 for _ in range(2)]
    scores: dict[str, list[np.ndarray]] = {RIVAL: [label + rng.normal(size=600) for label in labels]}
    scores["oracle"] = [label + 0.0 for label in labels]
    scores["noise"] = [rng.normal(size=600) for _ in labels]
    rows = {row["name"]: row for row in compare(scores, labels, np.arange(600) % 50, 200, 0)}
    assert rows["oracle"]["auc"]["mean"] == 1 and rows["oracle"]["stacked_minus_rival"]["low"] > 0
    assert rows["noise"]["minus_rival"]["high"] < 0 and abs(rows["noise"]["stacked_minus_rival"]["mean"]) < 0.02


def test_another_history_is_of_a_question_on_the_same_item():
    item = np.array([3, 1, 3, 1, 3, 2])
    other = of_another((item, item, item), np.random.default_rng(0))
    assert np.array_equal(item[other], item) and sorted(other.tolist()) == list(range(6))
    assert (other[:5] != np.arange(5)).all() and other[5] == 5


def test_a_history_is_what_came_before_newest_first(tiny_data):
    data = Dataset.open(tiny_data)
    log = data.log
    rows = np.arange(log.user_offsets[3], log.user_offsets[4])
    at = rows[log.time[rows] < log.time[rows[5]]]
    part = np.array([3]), np.array([0]), log.time[rows[5:6]]
    [text] = verbalised(log, data.items, part)
    signs = ["disliked" if log.feedback[row] == 2 else "liked" for row in at[::-1]]
    expected = [f"{sign}: {data.items.text[log.item[row]]}" for sign, row in zip(signs, at[::-1], strict=True)]
    assert text == " ".join(expected)
