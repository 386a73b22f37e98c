"""The verdict: its encoding, what it can learn, and that the same seed fits the same weights."""

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from negfast.model.trees import fit_boosted
from negfast.model.verdict import BINS, Verdict, fit


def table(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels that no linear model of the features can tell: a hump, an interaction, and what missing means."""
    x = rng.normal(size=(size, 4))
    x[rng.random((size, 4)) < 0.1] = np.nan
    logit = 2.0 * (np.abs(np.nan_to_num(x[:, 0])) < 0.6) + 2.5 * np.sign(np.nan_to_num(x[:, 1] * x[:, 2]))
    logit += np.where(np.isnan(x[:, 3]), 1.5, 0.0) - 1.0
    return x, (rng.random(size) < 1 / (1 + np.exp(-logit))).astype(np.float32)


def test_it_answers_zero_before_it_is_fitted() -> None:
    verdict, features = Verdict(3), torch.randn(5, 3)
    with torch.inference_mode():
        assert verdict(features).eq(0).all()
    assert verdict(features).eq(0).all()


def test_it_is_the_mean_of_networks_and_trees() -> None:
    verdict = Verdict(4)
    features, labels = table(np.random.default_rng(5), 2_000)
    features = features.astype(np.float32)
    fit(verdict, features, labels, seed=0)
    asked = torch.from_numpy(features)
    exact = copy.deepcopy(verdict).double()
    networks = exact.logits(exact.encode(asked.double())).mean(0)
    trees = fit_boosted(features, labels, seed=0).decision_function(asked)
    expected = (networks + torch.from_numpy(trees)) / 2
    with torch.inference_mode():
        in_core = verdict(asked)
    for found in (in_core, verdict(asked)):
        assert (found - expected).norm() / expected.norm() < 1e-6


def test_encoding_is_that_of_a_slow_loop() -> None:
    verdict = Verdict(2)
    edges = np.sort(np.random.default_rng(0).normal(size=(2, BINS + 1)), axis=1)
    edges[1, 3:6] = edges[1, 3]  # bins of no width
    verdict.edges.copy_(torch.from_numpy(edges))
    edges = verdict.edges.double().numpy()
    features = torch.tensor([[0.1, float("nan")], [-9.0, 9.0], [float(edges[0, 4]), -0.2]])
    got = verdict.encode(features).view(3, 2, BINS + 1)
    for row in range(3):
        for column in range(2):
            x = float(features[row, column])
            for b in range(BINS):
                low, high = edges[column, b], edges[column, b + 1]
                known = high > low and not np.isnan(x)
                expected = min(max((x - low) / (high - low), 0.0), 1.0) if known else 0.0
                assert abs(float(got[row, column, b]) - expected) < 1e-5
            assert float(got[row, column, BINS]) == np.isnan(x)


@pytest.mark.job
def test_it_learns_humps_interactions_and_missing_values() -> None:
    rng = np.random.default_rng(1)
    verdict = Verdict(4)
    fit(verdict, *table(rng, 20_000), seed=0)
    features, labels = table(rng, 5_000)
    logit = verdict(torch.from_numpy(features).float()).numpy()
    assert roc_auc_score(labels, logit) > 0.85  # a linear model stays at 0.55, the truth itself is at 0.89
    assert abs((1 / (1 + np.exp(-logit))).mean() - labels.mean()) < 0.03


def test_the_same_seed_fits_the_same_weights_and_leaves_the_generator_alone() -> None:
    features, labels = table(np.random.default_rng(2), 2_000)
    first, second, other = Verdict(4), Verdict(4), Verdict(4)
    state = torch.get_rng_state()
    fit(first, features, labels, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    fit(second, features, labels, seed=3)
    fit(other, features, labels, seed=4)
    for of_first, of_second in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(of_first, of_second)
    assert not torch.equal(first.wide.weight, other.wide.weight)
    assert not torch.equal(first.trees.threshold, other.trees.threshold)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in first.parameters())


def test_features_that_are_never_known_or_constant_do_no_harm() -> None:
    rng = np.random.default_rng(6)
    features, labels = table(rng, 1_000)
    features[:, 0], features[:, 1] = np.nan, 7.0
    verdict = Verdict(4)
    fit(verdict, features, labels, seed=0)
    assert torch.isfinite(verdict(torch.from_numpy(features).float())).all()
