"""The share of mixed histories over the steps of GRPO, and for whom."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from negfast.config import Grpo
from negfast.model.histories import MIXED, NEGATIVE_ONLY
from negfast.runtime.run_folder import RunFolder
from negfast.train.grpo import schedule
from negfast.train.grpo.schedule import ViewSchedule, history_bucket, measure_views
from negfast.train.grpo.stage import GrpoStage
from negfast.train.step import WHOLE, MicroBatch

ALL = np.ones(20_000, dtype=bool)
PROGRESSIVE = Grpo(steps=100, schedule="progressive", negative_phase=0.4, mixed_share=0.6)


def test_progressive_is_negative_only_and_then_rises_to_the_share() -> None:
    shares = [ViewSchedule(PROGRESSIVE, ALL).share(step) for step in range(100)]
    assert shares[:40] == [0.0] * 40
    assert np.diff(shares[39:]) == pytest.approx(np.full(60, 0.01))
    assert shares[-1] == pytest.approx(0.6)


@pytest.mark.parametrize("name,share", [("mixed", 1.0), ("static", 0.6)])
def test_the_others_do_not_change(name: str, share: float) -> None:
    views = ViewSchedule(Grpo(steps=100, mixed_share=0.6, schedule=name), ALL)
    assert {views.share(step) for step in range(100)} == {share}


def test_views_are_drawn_with_the_share_for_those_who_may_have_them() -> None:
    allow_mixed = np.arange(len(ALL)) % 4 > 0
    views = ViewSchedule(PROGRESSIVE, allow_mixed)
    rows = np.random.default_rng(1).permutation(len(allow_mixed))
    drawn = views.draw(99, rows, np.random.default_rng(0))
    assert set(drawn.tolist()) == {MIXED, NEGATIVE_ONLY}
    assert (drawn[~allow_mixed[rows]] == NEGATIVE_ONLY).all()
    assert (drawn[allow_mixed[rows]] == MIXED).mean() == pytest.approx(0.6, abs=0.02)
    assert views.share(99) == pytest.approx(0.6 * 0.75)


@pytest.mark.parametrize("loss,expected", [(0.0, True), (0.04, True), (0.5, False)])
def test_likes_are_shown_where_they_cost_no_reward(tiny_run, monkeypatch, loss: float, expected: bool) -> None:
    """Mixed histories earn a ``loss`` less of short histories' reward, and twice as much of the others'."""
    engine = RunFolder(tiny_run).finished_engine(None)
    requests = engine.split.train.only(engine.split.train.has_dislikes)
    monkeypatch.setattr(schedule, "BUCKETS", (10,))
    monkeypatch.setattr(schedule, "reward_table", lambda *_: None)

    def rewards(_engine, part, _table, view):
        negative = 1.0 + np.random.default_rng(len(part)).random(len(part))
        gain = np.where(history_bucket(engine, part) == 0, 1 - loss, 2.0)
        return negative * gain if view == MIXED else negative

    monkeypatch.setattr(schedule, "expected_rewards", rewards)
    allow_mixed, figures = measure_views(engine, requests)
    assert set(history_bucket(engine, requests)) == {0, 1}
    assert allow_mixed.tolist() == [expected, True]
    assert figures["mixed_gain_0"] == pytest.approx(-loss * figures["negative_reward_0"])
    assert figures["mixed_gain_low_0"] <= figures["mixed_gain_0"]
    assert figures["mixed_gain_1"] == pytest.approx(figures["negative_reward_1"])


def test_a_request_that_comes_twice_in_a_step_has_two_numbers(tiny_run: Path) -> None:
    """Noise is keyed by the number: with the same one its second group would be the first over again."""
    stage = GrpoStage(RunFolder(tiny_run).finished_engine(None))
    most = stage.task.size - 3  # so that a step has the end of an epoch and most of the next
    stage.config = replace(stage.config, histories=most, requests_per_history=50)
    twice = 0
    for step in range(3):
        ids = group_ids(stage, step, WHOLE)
        assert len(ids.unique()) == len(ids) >= most
        requests = ids % len(stage.engine.train_requests)
        assert set(requests.tolist()) <= set(stage.rows.tolist())
        assert torch.equal(torch.cat([group_ids(stage, step, MicroBatch(number, 3)) for number in range(3)]), ids)
        twice += len(ids) - len(requests.unique())
    assert twice > 0


def group_ids(stage: GrpoStage, step: int, micro_batch: MicroBatch) -> torch.Tensor:
    groups = stage.read(step, micro_batch).groups
    assert groups is not None
    return groups.ids
