"""The GRPO and rollout benchmarks on a handful of tokens: what they time is a step, and the searches are the same."""

import json

import pytest

from bench.grpo import run
from bench.grpo_phases import breakdown
from bench.grpo_step import Case, Ours, quickstart_lengths
from bench.rollout import both_sides, check_same


def test_result_has_its_shape(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.grpo.make_case", lambda name, prompts: Case((5, 9), group=3))
    monkeypatch.setattr("bench.grpo.peak_mib", lambda case: 1.0)
    result = run(out=tmp_path / "grpo.json", repeats=2, peer="none", threads=1, only="G16")
    assert json.loads((tmp_path / "grpo.json").read_text()) == result
    assert [row["case"]["objective"] for row in result["rows"]] == ["trie", "full"]
    for row in result["rows"]:
        assert row["case"] | {"prompt": 7, "longest": 9, "prompts": 2, "group": 3, "levels": 4} == row["case"]
        assert row["median_s"] > 0 and len(row["seconds"]) == 2
        assert row["tokens"] == 14 + 3 * 6  # the prompts once, and all but the last token of each completion
    assert result["floor"]["G16"]["prompts_alone_s"] > 0


@pytest.mark.parametrize("objective", ["trie", "full"])
def test_phases_add_up_to_the_step(objective):
    phases = breakdown(Ours(Case((5, 9), group=3, objective=objective)), steps=2)
    total = phases.pop("total")
    assert all(seconds > 0 for seconds in phases.values())
    assert sum(phases.values()) == pytest.approx(total, rel=0.05)


def test_searches_are_the_same_and_a_difference_is_found():
    search, generate = both_sides(Case((6, 6), group=1, objective="full"))
    mine, theirs = search(20), generate(20)
    check_same(mine, theirs)
    assert mine[0] == theirs[0]
    other = [[(item + 1) % 20 for item in items] for items in mine[0]]
    with pytest.raises(AssertionError, match="items"):
        check_same(mine, (other, theirs[1]))
    with pytest.raises(AssertionError, match="log-prob"):
        check_same(mine, (theirs[0], theirs[1] - 0.01))


@pytest.mark.slow
def test_lengths_are_those_of_the_quickstart():
    lengths = quickstart_lengths(8)
    assert len(lengths) == 8 and min(lengths) >= 1 + 15 + 3 and max(lengths) <= 3 * 105 + 4
