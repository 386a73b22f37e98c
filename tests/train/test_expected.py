"""The expected reward is the sum over all items, and needs only those that earn something."""

import numpy as np
import pytest
import torch

from negfast.config import Reward
from negfast.data.log import DAY
from negfast.evaluate.sets import evaluation_set
from negfast.runtime.engine import Engine
from negfast.runtime.run_folder import RunFolder
from negfast.sid.prior import NEXT_DISLIKE
from negfast.train import expected
from negfast.train.expected import expected_rewards, item_log_probs, reward_table
from tests.model.all_items import all_item_log_probs


@pytest.fixture
def engine(tiny_run) -> Engine:
    engine = RunFolder(tiny_run).finished_engine(None)
    torch.nn.init.normal_(engine.policy.block.head.weight, std=0.2)  # codes speak as loudly as the prior
    return engine


@torch.no_grad()
def every_item(engine: Engine, user: np.ndarray, day: np.ndarray) -> np.ndarray:
    """log p of all items, [R, I], -inf where seen."""
    histories = engine.histories.build(user, (day.astype(np.int64) + 1) * DAY)
    return all_item_log_probs(engine.policy, engine.chooser, histories, NEXT_DISLIKE).double().numpy()


@pytest.mark.parametrize(
    "settings",
    [Reward(), Reward(collab_weight=0.0), Reward(like_penalty=0.6, collab_cap=0.05)],
)
def test_the_expected_reward_is_the_sum_over_all_items(engine, settings, monkeypatch):
    monkeypatch.setattr(expected, "TARGETS_AT_ONCE", 100)  # several batches
    requests = evaluation_set(engine.log, engine.split, "valid").requests.take(np.arange(40))
    table = reward_table(engine, requests, settings)
    probability = np.exp(every_item(engine, requests.user, requests.day))
    assert np.allclose(probability.sum(1), 1, atol=1e-5)
    rows, items = torch.arange(40)[:, None], torch.arange(engine.log.n_items)[None]
    rewards = table.look_up(rows, items.expand(40, -1)).sum(-1).double().numpy()
    seen = probability == 0
    assert (rewards[seen] != 0).any() or settings.collab_weight == 0  # a seen neighbour earns nothing
    got = expected_rewards(engine, requests, table)
    assert got.shape == (40,) and len(np.unique(got)) == 40
    np.testing.assert_allclose(got, (probability * rewards).sum(1), atol=1e-6)


def test_lists_of_any_length_and_none(engine):
    requests = evaluation_set(engine.log, engine.split, "valid").requests.take(np.arange(5))
    every = every_item(engine, requests.user, requests.day)
    unseen = [np.flatnonzero(np.isfinite(row)).astype(np.int32) for row in every]
    lists = [unseen[0], unseen[1][:0], unseen[2][3:4], unseen[3][:7], unseen[4][:0]]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in lists])])
    [got] = item_log_probs(engine, requests.user, requests.day, offsets, np.concatenate(lists))
    wanted = np.concatenate([every[row, part] for row, part in enumerate(lists)])
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert item_log_probs(engine, requests.user, requests.day, np.zeros(6, int), np.zeros(0, np.int32)).shape == (1, 0)


def test_batches_hold_so_many_rows_and_answers(monkeypatch):
    monkeypatch.setattr(expected, "TARGETS_AT_ONCE", 10)
    assert expected._cuts(np.array([0, 0, 1, 4, 5, 6, 11, 12]), 3) == [3, 5, 6, 7]
