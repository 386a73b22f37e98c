"""The GRPO and rollout benchmarks on a handful of tokens: what they time is a step, and the searches are the same."""

import json

import pytest
import torch

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


def test_a_shared_history_is_measured_beside_one_a_request(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.grpo.make_case", lambda name, prompts: Case((15, 25), group=2, shared=True))
    monkeypatch.setattr("bench.grpo.peak_mib", lambda case: 1.0)
    result = run(out=tmp_path / "grpo.json", repeats=1, peer="none", threads=1, only="user")
    assert [row["case"]["shared"] for row in result["rows"]] == [True, False]
    (ratio,) = result["ratios"]
    assert ratio["case"]["shared"] and 1 < ratio["predicted"] == result["rows"][1]["flops"] / result["rows"][0]["flops"]


def test_a_shared_history_is_read_once_and_gives_the_same_log_probs():
    shared, apart = Ours(Case((5, 9), group=3, shared=True)), Ours(Case((5, 9), group=3))
    apart.policy.load_state_dict(shared.policy.state_dict())
    apart.tokens = torch.cat([shared.tokens[:4], shared.tokens])
    apart.seen = shared.seen
    found, expected = shared.loss(), apart.loss()
    assert found.rollout.items.tolist() == expected.rollout.items.tolist()
    torch.testing.assert_close(found.terms.log_prob, expected.terms.log_prob, rtol=1e-4, atol=1e-5)
    shared.step()
    apart.step()
    assert apart.processed - shared.processed == 4


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
    assert len(lengths) == 8 and min(lengths) >= 3 and max(lengths) <= 514
