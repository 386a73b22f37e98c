import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from negfast.kernels.trie_grpo import GRPOObjective
from negfast.kernels.trie_grpo_reference import trie_grpo_reference
from negfast.kernels.trie_rows_reference import log_policy
from negfast.sid.prior import NEXT_DISLIKE, NEXT_LIKE
from negfast.train.grpo.rollout import replay_logits, rollout
from tests.train.small import make_small


def sample(small, group, step=0, ids=None, seed=0):
    ids = torch.arange(len(small.seen)) if ids is None else ids
    histories = small.histories()
    return histories, rollout(small.policy, small.chooser, histories, ids, NEXT_DISLIKE, group, seed, step)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_probabilities_of_unseen_leaves_sum_to_one(levels):
    small = make_small(levels, levels=levels, codebook={1: 48, 2: 8, 4: 6}[levels])
    for branch in (NEXT_DISLIKE, NEXT_LIKE):
        total = np.exp(small.leaf_log_probs(branch)).sum(1)
        assert np.abs(total - 1).max() < 1e-10


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [1, 3, 16])
def test_log_probs_of_samples_equal_separate_forwards(seed, group):
    small = make_small(seed, levels=1 + seed, codebook=[48, 8, 6, 4][seed])
    expected = small.leaf_log_probs(NEXT_DISLIKE)
    _, sampled = sample(small, group)
    log_p = sampled.choice.log_probs()
    counted = sampled.tokens.counted
    of_token = torch.where(counted, log_p[sampled.tokens.row, sampled.tokens.code], 0.0)
    of_completion = torch.zeros(sampled.items.numel(), dtype=log_p.dtype).index_add(
        0, sampled.tokens.completion, of_token
    )
    for b, items in enumerate(sampled.items.tolist()):
        assert not set(items) & set(small.seen[b])
        found = of_completion.view_as(sampled.items)[b].detach().numpy()
        assert np.abs(found - expected[b, items]).max() < 1e-9
    assert (small.trie.codes[sampled.items.flatten().numpy()] == sampled.codes.numpy()).all()


def test_forced_tokens_cost_no_forward_and_do_not_count():
    small = make_small(5, items=30, levels=4, codebook=4)
    _, sampled = sample(small, 8)
    unseen = [set(range(30)) - set(seen) for seen in small.seen]
    for completion, item in enumerate(sampled.items.flatten().tolist()):
        b = completion // 8
        for level in range(4):
            prefix = small.trie.codes[item, :level]
            options = {
                int(small.trie.codes[i, level]) for i in unseen[b] if (small.trie.codes[i, :level] == prefix).all()
            }
            token = level * sampled.items.numel() + completion
            assert bool(sampled.tokens.counted[token]) == (len(options) > 1)
            below = [i for i in unseen[b] if (small.trie.codes[i, :level] == prefix).all()]
            if level:
                path = (b, *sampled.codes[completion, :level].tolist())
                rows = [(row // 8, *sampled.codes[row, :level].tolist()) for row in sampled.rows[level].tolist()]
                assert rows.count(path) == (len(below) > 1)  # completions that agree so far share a row


@pytest.mark.parametrize("seed", range(3))
def test_single_pass_equals_two_pass_in_loss_and_gradient(seed):
    small = make_small(seed, levels=3)
    objective = GRPOObjective(beta=0.1)
    histories, sampled = sample(small, 6)
    rewards = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    choice = sampled.choice
    reference = log_policy(torch.randn_like(choice.logits), choice.valid, choice.log_prior, 1.0)
    parameters = [p for p in small.policy.parameters() if p.requires_grad and p is not small.policy.text_head.weight]

    def gradients(logits):
        terms = trie_grpo_reference(
            logits, choice.valid, choice.log_prior, sampled.tokens, rewards, objective, 3, reference
        )
        return terms.loss, torch.autograd.grad(terms.loss, parameters, allow_unused=True)

    loss, wanted = gradients(choice.logits)
    two_pass, found = gradients(replay_logits(small.policy, histories.fresh(), sampled))
    assert abs(two_pass - loss) < 1e-12
    for want, got in zip(wanted, found, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            assert (got - want).abs().max() <= 1e-9 * want.abs().max().clamp_min(1e-12)


def test_sampled_frequencies_follow_the_policy():
    small = make_small(11, items=12, levels=2, codebook=4, prompts=2)
    expected = np.exp(small.leaf_log_probs(NEXT_DISLIKE))
    counts = np.zeros_like(expected)
    for step in range(20):
        _, sampled = sample(small, 256, step)
        for b in range(2):
            counts[b] += np.bincount(sampled.items[b].numpy(), minlength=12)
    for b in range(2):
        possible = expected[b] > 0
        assert counts[b][~possible].sum() == 0
        likely = expected[b] * 20 * 256 >= 5  # the chi-square approximation needs counts
        rest = possible & ~likely
        observed, wanted = counts[b][likely], expected[b][likely] * 20 * 256
        if rest.any():
            observed, wanted = (
                np.append(observed, counts[b][rest].sum()),
                np.append(wanted, expected[b][rest].sum() * 5120),
            )
        assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


def test_noise_follows_the_request_whatever_the_batch():
    small = make_small(3, prompts=3)
    ids = torch.tensor([17, 5, 900])
    _, together = sample(small, 4, step=7, ids=ids)
    _, wider = sample(small, 64, step=7, ids=ids)
    assert (together.items == wider.items[:, :4]).all()
    _, other_step = sample(small, 64, step=8, ids=ids)
    _, other_seed = sample(small, 64, step=7, ids=ids, seed=1)
    assert (other_step.items != wider.items).any() and (other_seed.items != wider.items).any()
