import numpy as np
import pytest
import torch

from negfast.data.log import DAY, DISLIKE, EventLog
from negfast.model.beam import beam_search, stable_topk
from negfast.sid.prior import NEXT_DISLIKE, DevicePrior
from tests.train.small import make_small


@pytest.mark.parametrize("seed", range(4))
def test_wide_beam_is_the_exact_ranking(seed):
    small = make_small(seed, levels=1 + seed, codebook=[48, 8, 6, 4][seed])
    exact = small.leaf_log_probs(NEXT_DISLIKE)
    histories = small.histories()
    items, score = beam_search(small.policy, small.chooser, histories, histories.prior, NEXT_DISLIKE, width=64, top=10)
    for b in range(len(small.seen)):
        order = np.argsort(-exact[b], kind="stable")[:10]
        assert items[b].tolist() == order.tolist()
        assert np.abs(score[b].numpy() - exact[b, order]).max() < 1e-9


@pytest.mark.parametrize("width", [1, 2, 5])
def test_narrow_beam_gives_distinct_unseen_items(width):
    small = make_small(9, levels=3)
    exact = small.leaf_log_probs(NEXT_DISLIKE)
    histories = small.histories()
    items, score = beam_search(
        small.policy, small.chooser, histories, histories.prior, NEXT_DISLIKE, width=width, top=50
    )
    assert items.shape == score.shape == (3, 50)
    for b, row in enumerate(items.tolist()):
        found = [i for i in row if i >= 0]
        assert row == found + [-1] * (50 - len(found))
        assert len(set(found)) == len(found) > 0 and not set(found) & set(small.seen[b])
        assert np.abs(score[b, : len(found)].numpy() - exact[b, found]).max() < 1e-9
        assert torch.isneginf(score[b, len(found) :]).all()


def test_without_a_policy_the_prior_is_searched():
    small = make_small(2, levels=3)
    torch.nn.init.zeros_(small.policy.block.head.weight)  # as the policy starts
    item = np.repeat(np.arange(40), 1 + np.random.default_rng(0).permutation(40))  # no two items are as probable
    dislikes = np.full(len(item), DISLIKE, np.uint8)
    log = EventLog(np.array([0, len(item)]), item.astype(np.int32), dislikes, np.full(len(item), 101 * DAY), None, 40)
    prior = DevicePrior.build(small.trie, log, 2.0, 0.05, "cpu", torch.float64)
    small.prior = prior.for_requests(np.array([101, 101, 101]), small.prior.seen)
    expected = small.leaf_log_probs(NEXT_DISLIKE)
    histories = small.histories()
    items, _ = beam_search(None, small.chooser, histories, histories.prior, NEXT_DISLIKE, 64, 8)
    for b in range(3):
        assert items[b].tolist() == np.argsort(-expected[b], kind="stable")[:8].tolist()


def test_stable_topk_breaks_ties_by_column():
    values = torch.randint(0, 3, (50, 17)).double()
    values[0] = -torch.inf
    found, index = stable_topk(values, 6)
    expected = np.argsort(-values.numpy(), axis=1, kind="stable")[:, :6]
    assert (index.numpy() == expected).all()
    assert (found == values.gather(1, index)).all()
