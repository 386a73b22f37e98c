"""The validation of a stage: likelihoods, the scale that it chooses and its score."""

import numpy as np
import pytest
import torch

from negfast.data.split import Requests
from negfast.evaluate.sets import evaluation_set
from negfast.runtime.engine import Engine
from negfast.runtime.run_folder import RunFolder
from negfast.sid.prior import NEXT_DISLIKE
from negfast.train.expected import item_log_probs
from negfast.train.validation import Validation
from tests.model.all_items import all_item_log_probs


@pytest.fixture
def engine(tiny_run) -> Engine:
    engine = RunFolder(tiny_run).finished_engine(None)
    torch.nn.init.normal_(engine.policy.block.head.weight, std=0.2)  # codes speak as loudly as the prior
    return engine


def future_log_probs(engine: Engine, requests: Requests) -> np.ndarray:
    """Of every item of every F, under the scale that is set."""
    return item_log_probs(engine, requests.user, requests.day, requests.dislike_offsets, requests.dislikes)[0]


def test_log_probs_of_futures_are_those_of_scoring_all_items(engine):
    requests = evaluation_set(engine.log, engine.split, "valid").requests
    got = future_log_probs(engine, requests)
    rows = np.random.default_rng().permutation(len(requests))[:5]
    part = requests.take(rows)
    histories = engine.histories.build(part.user, part.moment)
    with torch.no_grad():
        every = all_item_log_probs(engine.policy, engine.chooser, histories, NEXT_DISLIKE).numpy()
    for place, row in enumerate(rows):
        low, high = requests.dislike_offsets[row], requests.dislike_offsets[row + 1]
        np.testing.assert_allclose(got[low:high], every[place, requests.dislikes[low:high]], atol=2e-5)


def test_validation_chooses_the_scale_that_makes_futures_likeliest(engine):
    valid = evaluation_set(engine.log, engine.split, "valid")
    scales = (0.1, 0.5, 1.0)
    validation = Validation(engine, valid, scales)
    metrics, requests = validation(), validation.requests
    counts = np.diff(requests.dislike_offsets)
    nlls = {}
    for scale in scales:
        engine.policy.block.scale.fill_(scale)
        nlls[scale] = -float((future_log_probs(engine, requests) / np.repeat(counts, counts)).sum() / len(counts))
    assert len(set(nlls.values())) == len(scales)
    assert metrics["scale"] == min(nlls, key=nlls.__getitem__)
    assert abs(metrics["nll"] - min(nlls.values())) < 1e-9 and metrics["score"] == -metrics["nll"]


def test_validation_by_reward_scores_the_expected_reward(engine):
    metrics = Validation(engine, evaluation_set(engine.log, engine.split, "valid"), by_reward=True)()
    assert metrics["score"] == metrics["reward"] != 0 and metrics["nll"] > 0
