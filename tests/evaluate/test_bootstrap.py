"""Resamples against the plain way: repeat each user's rows as often as the user was drawn, and recompute."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from negfast.evaluate.bootstrap import interval, ranked_totals, ratio, resample_users, weighted_sums


def repeated(weights: np.ndarray, user: np.ndarray) -> np.ndarray:
    """Row indices of a resample."""
    return np.repeat(np.arange(len(user)), weights[user])


@pytest.fixture(params=[(1, 1), (7, 40), (53, 401)])
def events(request: pytest.FixtureRequest) -> tuple[np.ndarray, ...]:
    n_users, n_events = request.param
    rng = np.random.default_rng(n_events)
    weights = resample_users(n_users, 150, seed=n_events)
    user = rng.integers(0, n_users, n_events)
    score = np.round(rng.normal(size=n_events), 1)  # many ties
    return weights, user, score, rng.random(n_events) < 0.3


def test_resamples_draw_users_with_replacement() -> None:
    weights = resample_users(300, 500, seed=1)
    assert weights.shape == (501, 300) and (weights[0] == 1).all()
    assert (weights.sum(1) == 300).all()
    assert (weights == resample_users(300, 500, seed=1)).all()
    assert (weights != resample_users(300, 500, seed=2)).any()
    counts = np.bincount(weights[1:].ravel(), minlength=5)[:5] / weights[1:].size
    poisson = np.exp(-1) / np.array([1, 1, 2, 6, 24])
    assert counts == pytest.approx(poisson, abs=0.004)


def test_weighted_sums_repeat_rows(events: tuple[np.ndarray, ...]) -> None:
    weights, user, score, dislike = events
    columns = np.stack([score, dislike, np.ones(len(user))], axis=1)
    sums = weighted_sums(weights, user, columns)
    for b in range(0, len(weights), 7):
        np.testing.assert_allclose(sums[b], columns[repeated(weights[b], user)].sum(0), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("share", [0.1, 0.37, 1.0])
def test_ranked_totals_repeat_rows(events: tuple[np.ndarray, ...], share: float) -> None:
    weights, user, score, dislike = events
    totals = ranked_totals(weights, user, score, dislike, share)
    for b in range(0, len(weights), 3):
        rows = repeated(weights[b], user)
        s, d = score[rows], dislike[rows]
        assert totals.events[b] == len(rows) and totals.dislikes[b] == d.sum()
        if 0 < d.sum() < len(d):
            assert totals.auc[b] == pytest.approx(roc_auc_score(d, s), abs=1e-12)
        else:
            assert np.isnan(totals.auc[b])
        # the mean over random orders of tied events: whole blocks first, then a share of the next
        budget, taken = share * len(rows), 0.0
        for value in sorted(set(s.tolist()), reverse=True):
            block = s == value
            part = min(1.0, budget / block.sum())
            taken += part * d[block].sum()
            budget -= part * block.sum()
        assert totals.top_dislikes[b] == pytest.approx(taken, abs=1e-9)
        assert totals.top_events[b] == pytest.approx(share * len(rows))


def test_order_of_tied_events_does_not_matter(events: tuple[np.ndarray, ...]) -> None:
    weights, user, score, dislike = events
    shuffled = np.random.default_rng(0).permutation(len(user))
    a = ranked_totals(weights, user, score, dislike, 0.1)
    b = ranked_totals(weights, user[shuffled], score[shuffled], dislike[shuffled], 0.1)
    np.testing.assert_allclose(a.auc, b.auc, rtol=1e-12)
    np.testing.assert_allclose(a.top_dislikes, b.top_dislikes, rtol=1e-9, atol=1e-9)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        user = np.repeat(np.arange(80), rng.integers(1, 6, 80))  # users differ, rows of a user are alike
        value = rng.normal(0.3, 0.2, 80)[user] + rng.normal(0, 0.1, len(user))
        weights = resample_users(80, 200, seed=trial)
        sums = weighted_sums(weights, user, np.stack([value, np.ones(len(user))], axis=1))
        found = interval(ratio(sums[:, 0], sums[:, 1]))
        assert found["low"] is not None and found["high"] is not None
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.90 < covered / 300 < 0.985


def test_undefined_is_none() -> None:
    assert interval(np.array([np.nan, 1.0])) == {"mean": None, "low": None, "high": None}
    assert interval(np.array([0.5, np.nan, np.nan])) == {"mean": 0.5, "low": None, "high": None}
    assert np.isnan(ratio(np.array([0.0]), np.array([0.0]))).all()
