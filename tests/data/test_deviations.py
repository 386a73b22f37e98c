"""Deviations against a slow loop over the past, and nothing of the moment itself or later."""

import numpy as np
import pytest

from negfast.data.deviations import COUNT_SECONDS, PSEUDO_EVENTS, RECENT_PSEUDO_EVENTS, RECENT_SECONDS, Deviations
from negfast.data.log import DAY


def draw(rng: np.random.Generator, size: int, users: int = 7, items: int = 9, days: int = 60) -> tuple[np.ndarray, ...]:
    return rng.integers(0, users, size), rng.integers(0, items, size), rng.integers(0, days * 4, size) * (DAY // 4)


def slow(events: list[tuple[int, int, int, float, float]], mean: float, u: int, i: int, d: int) -> list[float]:
    """The columns of one kind for (u, i, d), by definition."""

    def item_mean(item: int, moment: int) -> float:
        past = [e for e in events if e[1] == item and e[2] < moment]
        return (sum(e[4] for e in past) + PSEUDO_EVENTS * mean) / (sum(e[3] for e in past) + PSEUDO_EVENTS)

    def user_excess(user: int, first: int, moment: int) -> tuple[float, float, float]:
        past = [e for e in events if e[0] == user and first <= e[2] < moment]
        excess = [e[4] - e[3] * item_mean(e[1], e[2]) for e in past]
        return sum(excess), sum(e[3] for e in past), sum(abs(x) * e[3] for x, e in zip(excess, past, strict=True))

    def item_excess(item: int, first: int, moment: int) -> tuple[float, float]:
        past = [e for e in events if e[1] == item and first <= e[2] < moment]
        total = 0.0
        for e in past:
            excess, count, _ = user_excess(e[0], -1, e[2])
            total += e[4] - e[3] * (mean + excess / (count + PSEUDO_EVENTS))
        return total, sum(e[3] for e in past)

    of_user, n_user, off = user_excess(u, -1, d)
    of_item, n_item = item_excess(i, -1, d)
    lately_user, m_user, _ = user_excess(u, d - RECENT_SECONDS, d)
    lately_item, m_item = item_excess(i, d - RECENT_SECONDS, d)
    user, item = of_user / (n_user + PSEUDO_EVENTS), of_item / (n_item + PSEUDO_EVENTS)
    lately = [lately_user / (m_user + RECENT_PSEUDO_EVENTS), lately_item / (m_item + RECENT_PSEUDO_EVENTS)]
    return [user, item, user + item, *lately, off / (n_user + 1)]


@pytest.mark.parametrize("seed", range(4))
def test_deviations_are_those_of_a_loop_over_the_past(seed: int) -> None:
    rng = np.random.default_rng(seed)
    user, item, time = draw(rng, 150)
    kinds = [(np.ones(150), rng.integers(0, 2, 150).astype(float), 0.3), (np.ones(150), rng.normal(6, 2, 150), 6.5)]
    kinds[1][0][rng.random(150) < 0.1] = 0.0  # a value that replaces an earlier one of the pair
    got = Deviations(user, item, time, kinds)
    asked = draw(rng, 20, users=8, items=10, days=70)  # also users, items and moments without a past
    columns = got.columns(*asked)
    assert columns.shape == (20, got.width)
    for row, (u, i, d) in enumerate(zip(*asked, strict=True)):
        expected: list[float] = []
        for count, total, mean in kinds:
            expected += slow(list(zip(user, item, time, count, total, strict=True)), mean, u, i, d)
        recent = ((user == u) & (time < d) & (time >= d - COUNT_SECONDS)).sum()
        np.testing.assert_allclose(columns[row], [*expected, np.log1p(recent)], atol=1e-12)


def test_the_moment_itself_and_later_ones_do_not_count() -> None:
    rng = np.random.default_rng(5)
    user, item, time = draw(rng, 300)
    total = rng.normal(size=300)
    asked = (rng.integers(0, 7, 40), rng.integers(0, 9, 40), np.full(40, 30 * DAY))
    changed = np.where(time >= 30 * DAY, total + 10, total)
    before, after = (Deviations(user, item, time, [(np.ones(300), t, 0.0)]).columns(*asked) for t in (total, changed))
    np.testing.assert_array_equal(before, after)
    assert not np.array_equal(before, Deviations(user, item, time, [(np.ones(300), total + 1, 0.0)]).columns(*asked))
