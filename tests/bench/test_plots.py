"""The figures of docs/results.md: from the results as they are, each with the numbers that it should show."""

import json
import re

import pytest
from click.testing import CliRunner

from bench.experiments.plots import FIGURES, PLOTS, RESULTS, digest, main, span_of

VALUE = {"mean": 0.5, "low": 0.25, "high": 0.75}


def quality() -> dict:
    metrics = ("mean_reward", "FHR@20", "filter_auc", "pool_auc")
    differences = [{"a": "grpo", "b": b, "metric": m, **VALUE} for b in ("sft", "boosted") for m in metrics]
    bins = [{"probability": 0.1, "dislike_rate": 0.125}, {"probability": 0.5, "dislike_rate": 0.375}]
    return {
        "differences": differences,
        "grpo_minus_sft": [{"seed": 3, "vs_long_mean_reward": VALUE}, {"seed": 4}],
        "rows": [{"name": "grpo", "filter_reliability": bins}, {"name": "item-rate"}],
    }


def ablations() -> dict:
    part = {"a": "grpo", "b": "default grpo", "metric": "filter_auc", **VALUE}
    others = [{**part, "metric": "filter_reduction"}, {**part, "a": "sft", "b": "default sft"}]
    rows = [("default", 0, [part]), ("no-prior", 0, [part, *others]), ("no-kl", 1, [part])]
    return {"rows": {f"{n}-{seed}": {"name": n, "seed": seed, "differences": found} for n, seed, found in rows}}


def test_figures_name_their_entries_and_a_digest_of_their_numbers(tmp_path):
    (tmp_path / "quality.json").write_text(json.dumps(quality()))
    (tmp_path / "ablations.json").write_text(json.dumps(ablations()))
    command = ["--results", str(tmp_path), "--out", str(tmp_path / "plots")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    shown = {name: (tmp_path / "plots" / f"{name}.svg").read_text() for name in FIGURES}
    assert all(label in shown["differences"] for label in (">sft<", ">boosted<", "sft-long, seed 3", "filter AUC"))
    assert "seed 4" not in shown["differences"]
    assert ">no-prior<" in shown["ablations"] and ">default<" not in shown["ablations"]
    assert ">grpo<" in shown["reliability"] and "item-rate" not in shown["reliability"]
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0
    assert all((tmp_path / "plots" / f"{name}.svg").read_text() == text for name, text in shown.items())


def test_one_entry_far_out_leaves_room_for_the_others():
    near = [{"mean": 0.0, "low": -1.0, "high": 2.0}, {"mean": 0.5, "low": 0.0, "high": 1.0}]
    assert span_of(near) == pytest.approx(2.2) and span_of(near[1:]) == pytest.approx(1.1)
    assert span_of([*near, {"mean": -9.0, "low": -10.0, "high": -8.0}]) == pytest.approx(3.3)


def test_what_is_shown_is_selected_from_the_results():
    assert FIGURES["differences"][1](quality())["mean_reward"][-1] == ("sft-long, seed 3", VALUE)
    assert FIGURES["ablations"][1](ablations())["filter_auc"] == [("no-prior", VALUE), ("no-kl, seed 1", VALUE)]
    assert FIGURES["ablations"][1](ablations())["mean_reward"] == []
    assert FIGURES["reliability"][1](quality()) == {"grpo": [(0.1, 0.125), (0.5, 0.375)]}


def test_the_figures_of_the_page_show_what_the_results_say():
    for name, (file, shown, _) in FIGURES.items():
        wanted = digest(shown(json.loads((RESULTS / file).read_text())))
        found = re.search(r"<dc:description>(\w+)</dc:description>", (PLOTS / f"{name}.svg").read_text())
        assert found and found[1] == wanted, f"run python -m bench.experiments.plots: {name} has drifted"
