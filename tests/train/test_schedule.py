"""The share of mixed prompts over the steps of GRPO."""

import numpy as np
import pytest

from negfast.config import Grpo
from negfast.model.prompts import MIXED, NEGATIVE_ONLY
from negfast.train.schedule import mixed_share, schedule_views


def test_progressive_is_negative_only_and_then_rises_to_the_share() -> None:
    settings = Grpo(steps=100, schedule="progressive", negative_phase=0.4, mixed_share=0.6)
    shares = [mixed_share(step, settings) for step in range(100)]
    assert shares[:40] == [0.0] * 40
    assert np.diff(shares[39:]) == pytest.approx(np.full(60, 0.01))
    assert shares[-1] == pytest.approx(0.6)


@pytest.mark.parametrize("schedule,share", [("mixed", 1.0), ("static", 0.6)])
def test_the_others_do_not_change(schedule: str, share: float) -> None:
    settings = Grpo(steps=100, mixed_share=0.6, schedule=schedule)
    assert {mixed_share(step, settings) for step in range(100)} == {share}


def test_views_are_drawn_with_the_share() -> None:
    settings = Grpo(steps=10, mixed_share=0.3, schedule="static")
    views = schedule_views(0, 20_000, settings, np.random.default_rng(0))
    assert set(views.tolist()) == {MIXED, NEGATIVE_ONLY}
    assert (views == MIXED).mean() == pytest.approx(0.3, abs=0.02)
