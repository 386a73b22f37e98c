"""Metrics against slow readings of their definitions, on random sets with ties, padding and empty slices."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from negfast.data.log import EventLog
from negfast.data.split import Requests, split_requests
from negfast.evaluate.bootstrap import resample_users
from negfast.evaluate.metrics import (
    CUTOFFS,
    Costs,
    cost_samples,
    filter_samples,
    future_hits,
    generation_samples,
    pool_samples,
    reliability_curve,
)
from negfast.evaluate.predictions import Predictions, threshold_for_share
from negfast.evaluate.sets import EvalSet, evaluation_set

MakeLog = Callable[..., EventLog]


@pytest.fixture(params=range(3))
def test_set(random_log: MakeLog, request: pytest.FixtureRequest) -> EvalSet:
    log = random_log(request.param, n_users=30, n_items=90, n_events=2000)
    test = evaluation_set(log, split_requests(log, 5, 15_025, 15_042), "test")
    cold = np.random.default_rng(request.param).random(90) < 0.3  # the log itself leaves hardly an item cold
    return replace(test, cold_item=cold)


def futures(requests: Requests, row: int) -> tuple[set[int], set[int]]:
    d, p = requests.dislike_offsets, requests.like_offsets
    return set(requests.dislikes[d[row] : d[row + 1]].tolist()), set(requests.likes[p[row] : p[row + 1]].tolist())


def random_generated(evalset: EvalSet, rng: np.random.Generator) -> np.ndarray:
    generated = np.stack([rng.permutation(90)[:50] for _ in range(len(evalset.requests))]).astype(np.int32)
    for row in np.flatnonzero(rng.random(len(generated)) < 0.3):
        generated[row, rng.integers(0, 50) :] = -1
    return generated


def points(samples: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values[0]) for name, values in samples.items()}


def test_generation_metrics(test_set: EvalSet) -> None:
    rng = np.random.default_rng(len(test_set.requests))
    requests, generated = test_set.requests, random_generated(test_set, rng)
    likeness = rng.random((90, 90)) * 1.2  # above 1 must count as 1

    def similarity(asked: Requests, items: np.ndarray) -> np.ndarray:
        return np.array(
            [[max(likeness[i, j] for j in futures(asked, r)[0]) for i in row] for r, row in enumerate(items)]
        )

    weights = resample_users(30, 0, seed=0)
    found = points(generation_samples(test_set, generated, weights, requests.user, similarity))

    slow: dict[str, list[float]] = {}
    hits_of: dict[str, list[int]] = {"": [0, 0], "/all": [0, 0]}
    for row in range(len(requests)):
        dislikes, likes = futures(requests, row)
        items = [i for i in generated[row].tolist() if i >= 0]
        slices = ["/all"] + [""] * bool(test_set.primary[row])
        history = "/past_dislike" if test_set.past_dislike[row] else "/no_past_dislike"
        for k in CUTOFFS:
            hits = [i for i in items[:k] if i in dislikes]
            gains = sum(1 / np.log2(rank + 2) for rank, i in enumerate(items[:k]) if i in dislikes)
            ideal = sum(1 / np.log2(rank + 2) for rank in range(min(len(dislikes), k)))
            credit = [1.0 if i in dislikes else min(1.0, max(likeness[i, j] for j in dislikes)) for i in items[:k]]
            for suffix in slices:
                slow.setdefault(f"FHR@{k}{suffix}", []).append(bool(hits))
                slow.setdefault(f"recall@{k}{suffix}", []).append(len(hits) / len(dislikes))
                slow.setdefault(f"NDCG@{k}{suffix}", []).append(gains / ideal)
                slow.setdefault(f"next_HR@{k}{suffix}", []).append(test_set.next_dislike[row] in items[:k])
                slow.setdefault(f"soft_FHR@{k}{suffix}", []).append(max(credit, default=0.0))
            slow.setdefault(f"FHR@{k}{history}", []).append(bool(hits))
            slow.setdefault(f"recall@{k}{history}", []).append(len(hits) / len(dislikes))
            for suffix, cold in (("/cold", True), ("/warm", False)):
                part = {i for i in dislikes if test_set.cold_item[i] == cold}
                if part:
                    slow.setdefault(f"FHR@{k}{suffix}", []).append(bool(part & set(items[:k])))
                    slow.setdefault(f"recall@{k}{suffix}", []).append(len(part & set(items[:k])) / len(part))
        for suffix in slices:
            hits_of[suffix][0] += len(dislikes & set(items[:20]))
            hits_of[suffix][1] += len(likes & set(items[:20]))
    expected = {name: float(np.mean(values)) for name, values in slow.items()}
    expected |= {f"known_hit_dislike_share@20{s}": d / (d + p) for s, (d, p) in hits_of.items()}
    undefined = {name for name, value in found.items() if np.isnan(value)}
    assert undefined == set(found) - set(expected)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_pool_metrics_with_ties(test_set: EvalSet) -> None:
    rng = np.random.default_rng(1)
    score = rng.integers(0, 12, test_set.pool_items.shape).astype(np.float64)
    user = test_set.pool_user
    found = points(pool_samples(test_set, score, resample_users(30, 0, 0), user))
    hits, aucs = [], []
    for row in score:
        label = np.arange(100) == 0
        aucs.append(roc_auc_score(label, row))
        above, tied = (row[1:] > row[0]).sum(), (row[1:] == row[0]).sum()
        hits.append(np.mean([above + place < 10 for place in range(tied + 1)]))
    cold = test_set.cold_item[test_set.pool_items[:, 0]]
    past = test_set.past_dislike[test_set.pool_request]
    for suffix, chosen in (("", cold | ~cold), ("/cold", cold), ("/warm", ~cold), ("/past_dislike", past)):
        if chosen.any():
            assert found[f"pool_hr@10{suffix}"] == pytest.approx(np.mean(np.array(hits)[chosen]))
            assert found[f"pool_auc{suffix}"] == pytest.approx(np.mean(np.array(aucs)[chosen]))
        else:
            assert np.isnan(found[f"pool_auc{suffix}"])


def test_a_constant_pool_score_is_chance(test_set: EvalSet) -> None:
    found = points(
        pool_samples(test_set, np.zeros(test_set.pool_items.shape), resample_users(30, 0, 0), test_set.pool_user)
    )
    assert found["pool_hr@10"] == pytest.approx(0.1) and found["pool_auc"] == pytest.approx(0.5)


def test_filter_metrics(test_set: EvalSet) -> None:
    rng = np.random.default_rng(2)
    dislike, n = test_set.filter_dislike, len(test_set.filter_user)
    score = np.clip(0.3 * dislike + rng.random(n) * 0.6, 0, 1)
    predictions = Predictions(filter_score=score, filter_is_probability=True, filter_threshold=0.7)
    found = points(filter_samples(test_set, predictions, resample_users(30, 0, 0), test_set.filter_user))
    assert found["filter_auc"] == pytest.approx(roc_auc_score(dislike, score))
    cold = test_set.cold_item[test_set.filter_item]
    if 0 < dislike[cold].sum() < cold.sum():
        assert found["filter_auc/cold"] == pytest.approx(roc_auc_score(dislike[cold], score[cold]))

    top = np.sort(score)[::-1][: int(np.ceil(n / 10))]  # all distinct: the last one is cut in part
    parts = np.where(score >= top[0] + 1, 0.0, (score > top[-1]).astype(float))
    parts[score == top[-1]] = n / 10 - (len(top) - 1)
    cut_dislikes = (parts * dislike).sum()
    after = (dislike.sum() - cut_dislikes) / (n - n / 10)
    assert found["filter_reduction"] == pytest.approx(1 - after / dislike.mean())
    assert found["filter_precision"] == pytest.approx(cut_dislikes / (n / 10))
    assert found["filter_likes_lost_per_dislike"] == pytest.approx((n / 10 - cut_dislikes) / cut_dislikes)

    cut = score >= 0.7
    assert found["filter_at_threshold_share"] == pytest.approx(cut.mean())
    assert found["filter_at_threshold_precision"] == pytest.approx(dislike[cut].mean())
    assert found["filter_at_threshold_reduction"] == pytest.approx(1 - dislike[~cut].mean() / dislike.mean())
    assert found["filter_at_threshold_likes_lost_per_dislike"] == pytest.approx(
        (~dislike[cut]).sum() / dislike[cut].sum()
    )

    order = np.argsort(score)
    bins = np.array_split(order, 20)
    slow_ece = sum(abs(score[b].sum() - dislike[b].sum()) for b in bins) / n
    assert found["filter_ece"] == pytest.approx(slow_ece, abs=0.02)  # bin edges lie between events
    curve = reliability_curve(score, dislike)
    assert sum(point["events"] for point in curve) == n
    assert sum(abs(p["probability"] - p["dislike_rate"]) * p["events"] for p in curve) / n == pytest.approx(
        found["filter_ece"]
    )
    assert [p["probability"] for p in curve] == sorted(p["probability"] for p in curve)


def test_calibration_error_of_a_constant(test_set: EvalSet) -> None:
    """Equal scores fall into one bin, whatever their order in the data."""
    n = len(test_set.filter_user)
    predictions = Predictions(filter_score=np.full(n, 0.9), filter_is_probability=True)
    found = points(filter_samples(test_set, predictions, resample_users(30, 0, 0), test_set.filter_user))
    assert found["filter_ece"] == pytest.approx(0.9 - test_set.filter_dislike.mean())
    assert found["filter_auc"] == 0.5 and found["filter_reduction"] == pytest.approx(0.0)


@pytest.mark.parametrize("seed", range(5))
def test_threshold_filters_the_share_asked_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = np.round(rng.random(int(rng.integers(1, 400))), int(rng.integers(1, 4)))
    threshold = threshold_for_share(score, 0.1)
    shares = {value: (score >= value).mean() for value in score}
    assert abs(shares[threshold] - 0.1) == min(abs(share - 0.1) for share in shares.values())


def test_future_hits_with_empty_lists_and_padding() -> None:
    generated = np.array([[3, -1, 0], [7, 3, -1], [-1, -1, -1]], dtype=np.int32)
    hits = future_hits(np.array([0, 0, 2, 3]), np.array([3, 9, 0]), generated)
    assert hits.tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert not future_hits(np.array([0, 0, 0, 0]), np.array([], dtype=np.int32), generated).any()


def test_cost_samples_are_those_of_counting(test_set: EvalSet) -> None:
    rng = np.random.default_rng(len(test_set.filter_user))
    score = np.round(rng.random(len(test_set.filter_user)), 1)  # some lie on the threshold
    costs = Costs(dislike=1.5, like=1.0)
    assert costs.threshold == 0.4
    weights = resample_users(30, 3, seed=1)
    found = cost_samples(test_set, score, costs, weights, test_set.filter_user)
    for b, weight in enumerate(weights):
        events = np.repeat(np.arange(len(score)), weight[test_set.filter_user])  # the resample, written out
        bad, out = test_set.filter_dislike[events], score[events] >= 0.4
        assert found["withheld_share"][b] == pytest.approx(out.mean(), rel=1e-12)
        assert found["dislikes_avoided_share"][b] == pytest.approx(out[bad].mean(), rel=1e-12)
        assert found["likes_withheld_share"][b] == pytest.approx(out[~bad].mean(), rel=1e-12)
        cost_of_all, cost_with_filter = 1.5 * bad.sum(), 1.5 * (bad & ~out).sum() + (~bad & out).sum()
        saved = 1000 * (cost_of_all - cost_with_filter) / len(events)
        assert found["saved_per_1000"][b] == pytest.approx(saved, rel=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0, 9.0])
def test_no_threshold_is_cheaper_than_that_of_the_costs(ratio: float) -> None:
    """For a calibrated probability, in expectation: the dislikes at a score p are p of its events."""
    p, costs = np.linspace(0.001, 0.999, 999), Costs(dislike=ratio, like=1.0)
    expected = {at: float(np.where(p >= at, 1 - p, ratio * p).sum()) for at in np.linspace(0, 1, 501)}
    at_threshold = float(np.where(p >= costs.threshold, 1 - p, ratio * p).sum())
    assert at_threshold <= min(expected.values()) * (1 + 1e-12)
