"""What the simulator experiment measures, in worlds where the truth is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.experiments import simulator
from bench.experiments.simulator import aimed, filter_effects, later_dislikes, recovery, true_probability
from bench.simulate import FIRST_DAY, SimulationSettings, simulate
from negfast.data.log import DISLIKE
from negfast.data.split import split_requests
from negfast.errors import InputError

SIZES: dict[str, Any] = {"users": 700, "items": 300, "days": 50, "impressions": 3.0, "topics": 10}


def test_later_dislikes_are_in_order_and_unseen() -> None:
    log = simulate(SimulationSettings(**SIZES)).log
    found_any = False
    for user in range(0, 200, 7):
        mine = slice(log.user_offsets[user], log.user_offsets[user + 1])
        columns = (log.item[mine].tolist(), log.feedback[mine].tolist(), log.day[mine].tolist())
        own = list(zip(*columns, strict=True))
        for day in (FIRST_DAY + 5, FIRST_DAY + 25):
            seen = {item for item, _, when in own if when <= day}
            expected = [i for i, f, when in own if when > day and f == DISLIKE and i not in seen]
            assert later_dislikes(log, user, day).tolist() == expected
            found_any |= len(expected) > 1
    assert found_any


def test_true_probability_undoes_the_reporting() -> None:
    settings = SimulationSettings()
    p = np.linspace(0.01, 0.99, 50)
    reported_dislikes = p * settings.report_dislike + (1 - p) * settings.false_dislike
    reported = reported_dislikes / (reported_dislikes + (1 - p) * settings.report_like)
    np.testing.assert_allclose(true_probability(reported, settings), p)


def test_propensities_find_the_true_effect_of_a_filter() -> None:
    settings = SimulationSettings(**SIZES, dislike_rate=0.3)
    result = filter_effects(simulate(settings), user_days=1_000)
    reduction = {row["name"]: row["reduction"] for row in result["rows"]}
    truth = reduction["truth, slots filled"]["mean"]
    assert truth > 0.03
    assert result["share_withheld"] == pytest.approx(0.1, abs=0.06)
    auc = result["observed_auc"]
    assert 0.5 < auc["score"]["low"] < auc["score"]["high"] < auc["truth"]["low"] < 1
    for name in ("IPS, slots filled", "doubly robust, slots filled"):
        assert reduction[name]["low"] < truth < reduction[name]["high"]
        assert abs(reduction[name]["mean"] - truth) < 0.05
    widths = {name: interval["high"] - interval["low"] for name, interval in reduction.items()}
    assert widths["truth, slots filled"] < widths["IPS, slots filled"]


@pytest.mark.slow
def test_recovery_trains_on_each_target_and_finds_its_runs_again(tmp_path, monkeypatch) -> None:
    simulation = simulate(SimulationSettings(**SIZES | {"users": 250}, dislike_rate=0.3))
    monkeypatch.setattr(simulator, "REQUESTS", 60)
    monkeypatch.setattr(simulator, "TARGETS", ("window", "later"))
    found = recovery(simulation, tmp_path, "smoke", 2, [0])
    assert found["requests"] == 60
    rows = {row["name"]: row for row in found["rows"]}
    best = rows["best"]["true_probability"]["low"]
    assert rows["random"]["true_probability"]["high"] < best
    for target in simulator.TARGETS:
        assert 0 < rows[target]["true_probability"]["mean"] < best
        assert rows[target]["top_dislikes"]["mean"] < rows["best"]["top_dislikes"]["mean"]
        assert abs(rows[target]["verdict_rank_correlation"]["mean"]) < 1
        assert (tmp_path / f"{target}-0" / "checkpoints" / "sft").is_dir()
    monkeypatch.setattr(simulator, "aimed", None)  # nothing is trained again
    assert recovery(simulation, tmp_path, "smoke", 2, [0]) == found
    other = simulate(replace(simulation.settings, seed=simulation.settings.seed + 1))
    with pytest.raises(InputError, match=r"holds runs on another simulation, see simulation\.json"):
        recovery(other, tmp_path, "smoke", 2, [0])


def test_every_target_has_its_own_future() -> None:
    log = simulate(SimulationSettings(**SIZES | {"users": 250}, dislike_rate=0.3)).log
    split = split_requests(log, 7, FIRST_DAY + 25, FIRST_DAY + 36)
    requests = split.train.take()
    next_only = aimed(log, split, "next", requests, 0)
    later = aimed(log, split, "later", requests, 0)
    assert aimed(log, split, "window", requests, 0) is requests
    assert np.array_equal(np.diff(next_only.dislike_offsets), np.minimum(np.diff(requests.dislike_offsets), 1))
    assert np.array_equal(later.dislike_offsets, requests.dislike_offsets)
    beyond = 0
    for row in np.flatnonzero(requests.has_dislikes):
        own = slice(log.user_offsets[requests.user[row]], log.user_offsets[requests.user[row] + 1])
        items, days = log.item[own], log.day[own]
        ahead = (days > requests.day[row]) & (days < split.valid_day) & (log.feedback[own] == DISLIKE)
        window = requests.dislikes[requests.dislike_offsets[row] : requests.dislike_offsets[row + 1]]
        drawn = later.dislikes[later.dislike_offsets[row] : later.dislike_offsets[row + 1]]
        assert set(drawn) <= set(items[ahead]) - set(items[days <= requests.day[row]]) and len(set(drawn)) == len(drawn)
        beyond += len(set(drawn) - set(window))
    assert beyond > 0.2 * len(later.dislikes)
