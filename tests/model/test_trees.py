"""Boosted trees: in the core and in torch, they are scikit-learn's."""

from typing import Any

import numpy as np
import pytest
import torch

from negfast import _core
from negfast.errors import InputError
from negfast.model import trees
from negfast.model.trees import LEAVES, SPLITS, TREES, Trees, fit_boosted

COLUMNS = 7


def examples(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Features continuous and of few values, some of them unknown, and labels that follow them."""
    x = rng.normal(size=(size, COLUMNS)).astype(np.float32)
    x[:, 4:] = np.round(x[:, 4:] * 2) / 3
    for value in (np.nan, -0.0, 0.0):
        x[rng.random(x.shape) < 0.05] = value
    x[:, 1] = np.nan_to_num(x[:, 1])  # never unknown
    logit = np.sin(3 * np.nan_to_num(x[:, 0])) + np.isnan(x[:, 2]) + np.clip(x[:, 1] * np.nan_to_num(x[:, 5]), -2, 2)
    return x, (rng.random(size) < 1 / (1 + np.exp(-logit))).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Any:
    return fit_boosted(*examples(np.random.default_rng(0), 30_000), seed=0)


@pytest.fixture(scope="module")
def asked(model: Any) -> np.ndarray:
    """Features of which many are infinite, thresholds, or the next numbers beside one."""
    rng = np.random.default_rng(1)
    features, _ = examples(rng, 5_000)
    for value in (np.inf, -np.inf):
        features[rng.random(features.shape) < 0.05] = value
    nodes = np.concatenate([predictor.nodes for (predictor,) in model._predictors])
    for node in nodes[~nodes["is_leaf"].astype(bool)]:
        rows = rng.integers(len(features), size=3)
        threshold = np.float32(min(node["num_threshold"], 1e38))
        beside = [np.nextafter(threshold, np.float32(end)) for end in (-np.inf, np.inf)]
        features[rows, node["feature_idx"]] = [threshold, *beside]
    return features


def answers(fitted: Trees, features: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the core and of torch."""
    with torch.inference_mode():
        core = fitted(torch.from_numpy(features))
    return core, fitted(torch.from_numpy(features))


def test_every_leaf_is_that_of_scikit_learn(asked: np.ndarray) -> None:
    """Leaves are told apart by integers, of which every sum is exact."""
    rng = np.random.default_rng(2)
    model = fit_boosted(*examples(rng, 30_000), seed=1)
    model._baseline_prediction[:] = 1.0
    for (predictor,) in model._predictors:
        predictor.nodes["value"] = rng.integers(-1000, 1000, len(predictor.nodes))
    fitted = Trees()
    fitted.take(model)
    core, by_torch = answers(fitted, asked)
    assert np.array_equal(core.numpy(), model.decision_function(asked))
    assert torch.equal(core, by_torch)


def test_logits_are_those_in_float64(model: Any, asked: np.ndarray) -> None:
    fitted = Trees()
    fitted.take(model)
    expected = model.decision_function(asked)
    in_float64 = fitted(torch.from_numpy(asked).double())
    for found in (*answers(fitted, asked), in_float64):
        assert np.linalg.norm(found.numpy() - expected) < 1e-7 * np.linalg.norm(expected)
    assert in_float64.dtype == torch.float64 and fitted.value.ne(0).sum() > TREES * LEAVES / 2


def test_rounding_of_a_feature_does_not_decide(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds of scikit-learn are values of examples: moved between these, they part the examples alike."""
    features, labels = examples(np.random.default_rng(0), 30_000)
    monkeypatch.setattr(trees, "_centre", lambda *_: None)
    plain, expected = fit_boosted(features, labels, seed=0), model.decision_function(features)
    assert np.array_equal(plain.decision_function(features), expected)
    for end in (-np.inf, np.inf):
        rounded = np.nextafter(features, np.float32(end))
        assert np.array_equal(model.decision_function(rounded), expected)
    assert (plain.decision_function(rounded) != expected).mean() > 0.1


def test_a_copy_of_the_state_answers_alike(model: Any, asked: np.ndarray) -> None:
    fitted, copy = Trees(), Trees()
    before = answers(copy, asked)
    fitted.take(model)
    copy.load_state_dict(fitted.state_dict())
    for empty, given, copied in zip(before, answers(fitted, asked), answers(copy, asked), strict=True):
        assert empty.eq(0).all() and torch.equal(given, copied) and given.std() > 0.1


def test_a_row_does_not_depend_on_its_neighbours(model: Any, asked: np.ndarray) -> None:
    fitted = Trees()
    fitted.take(model)
    together, _ = answers(fitted, asked[:300])
    for row in (0, 17, 96, 299):
        assert torch.equal(answers(fitted, asked[row : row + 1])[0][0], together[row])


def test_few_examples_make_trees_without_splits() -> None:
    features, labels = examples(np.random.default_rng(3), 50)
    fitted = Trees()
    fitted.take(fit_boosted(features, labels, seed=0))
    rate = float(labels.mean())
    for found in answers(fitted, features):
        np.testing.assert_allclose(found, np.full(50, np.log(rate / (1 - rate))), rtol=1e-5)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("left_leaves", 1 << SPLITS, "left_leaves: found a split with all leaves on its left"),
        ("left_leaves", -1, "left_leaves: found a split with all leaves on its left"),
        ("feature", -1, "feature: found a negative one"),
        ("feature", COLUMNS, "features: found fewer than the trees ask for"),
    ],
)
def test_damaged_tables_are_refused(model: Any, asked: np.ndarray, name: str, value: int, message: str) -> None:
    fitted = Trees()
    fitted.take(model)
    fitted.get_buffer(name)[5, 0] = value
    with torch.inference_mode(), pytest.raises(InputError, match=message):
        fitted(torch.from_numpy(asked))


def test_tables_that_do_not_fit_are_refused() -> None:
    good = {name: buffer.numpy() for name, buffer in Trees().named_buffers()}
    for name in set(good) - {"feature"}:
        with pytest.raises(InputError, match=f"{name}: found 0 entries, expected {TREES}"):
            _core.Trees(**(good | {name: good[name][:0]}))
    splits, values = np.zeros((1, 32), np.int32), np.zeros((1, 33), np.float32)
    wide = dict.fromkeys(good, splits) | {"threshold": splits.astype(np.float32), "value": values}
    with pytest.raises(InputError, match="more splits than a tree may have"):
        _core.Trees(**(wide | {"unknown_right": splits.astype(bool)}))
