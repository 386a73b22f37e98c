"""Sampling without replacement: the sample itself, and estimates that must be unbiased."""

import numpy as np
import pytest
import torch
from negfast.kernels.trie_grpo import GRPOObjective, log_policy

from negfast.config import load_config
from negfast.errors import InputError
from negfast.sid.prior import NEXT_DISLIKE
from negfast.train.grpo.rollout import replay_logits
from negfast.train.grpo.sampling import (
    conditioned_gumbel,
    distinct_advantage,
    distinct_loss,
    importance_weight,
    rollout_without_replacement,
)
from negfast.train.grpo.stage import check_combinations, freeze, group_loss
from tests.model.all_items import all_item_log_probs
from tests.train.small import make_small

STANDARD_ERRORS = 4.5  # a true estimate strays further once in 150,000 comparisons


def draw(small, group, step=0, seed=0):
    batch = small.batch(group)
    return batch, rollout_without_replacement(
        small.policy, small.chooser, batch, torch.arange(len(small.seen)), NEXT_DISLIKE, group, seed, step
    )


@pytest.mark.parametrize("levels,codebook", [(1, 48), (2, 8), (3, 6), (4, 4)])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_answers_are_distinct_unseen_and_their_log_probs_exact(levels, codebook, group):
    small = make_small(levels, levels=levels, codebook=codebook)
    expected = small.leaf_log_probs(NEXT_DISLIKE)
    batch, sampled = draw(small, group)
    items = sampled.rollout.items
    for b, row in enumerate(items.tolist()):
        assert len(set(row)) == group and not set(row) & set(small.seen[b])
        assert np.abs(sampled.log_prob[b].numpy() - expected[b, row]).max() < 1e-9
    assert (small.trie.codes[items.flatten().numpy()] == sampled.rollout.codes.numpy()).all()
    tokens, choice = sampled.rollout.tokens, sampled.rollout.choice
    of_token = torch.where(tokens.counted, choice.log_probs()[tokens.row, tokens.code], 0.0)
    total = torch.zeros(items.numel(), dtype=of_token.dtype).index_add(0, tokens.answer, of_token)
    assert (total.view_as(items) - sampled.log_prob).abs().max() < 1e-9
    assert (replay_logits(small.policy, batch, sampled.rollout) - choice.logits).abs().max() < 1e-9


def test_noise_follows_the_request():
    small = make_small(3)
    _, few = draw(small, 3, step=5)
    _, more = draw(small, 8, step=5)
    assert (few.rollout.items == more.rollout.items[:, :3]).all()  # ordered by perturbed log-probability
    _, other = draw(small, 8, step=6)
    assert (other.rollout.items != more.rollout.items).any()


@pytest.mark.parametrize("group", [11, 12, 15])
def test_a_trie_smaller_than_the_group_is_summed_exactly(group):
    small = make_small(7, items=12, levels=2, codebook=4, prompts=3)
    expected = np.exp(small.leaf_log_probs(NEXT_DISLIKE))
    value = torch.randn(12, dtype=torch.float64)
    _, sampled = draw(small, group)
    for b in range(3):
        unseen = set(range(12)) - set(small.seen[b])
        answers = sampled.rollout.items[b].tolist()
        assert set(answers) == unseen if len(unseen) <= group else set(answers) < unseen
        weight = sampled.weight[b]
        assert (weight[len(unseen) :] == 0).all()
        if len(unseen) <= group:
            assert abs(weight.sum() - 1) < 1e-10
            assert abs((weight * value[answers]).sum() - (torch.from_numpy(expected[b]) * value).sum()) < 1e-10
        counted = sampled.rollout.tokens.counted.view(2, 3, group)[:, b]
        assert not counted[:, len(unseen) :].any()


def test_expectations_are_unbiased():
    small = make_small(11, items=12, levels=2, codebook=4, prompts=3)
    expected = np.exp(small.leaf_log_probs(NEXT_DISLIKE))
    value = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = expected @ value.numpy()
    plain, first = [], np.zeros((3, 12))
    with torch.no_grad():
        for step in range(800):
            _, sampled = draw(small, 3, step)
            plain.append((sampled.weight * value[sampled.rollout.items]).sum(1).numpy())
            first[np.arange(3), sampled.rollout.items[:, 0].numpy()] += 1
    plain = np.array(plain)
    error = plain.std(0) / len(plain) ** 0.5
    assert (np.abs(plain.mean(0) - truth) < STANDARD_ERRORS * error).all()
    # the first answer alone is a sample with replacement
    spread = np.sqrt(expected * (1 - expected) / len(plain))
    assert (np.abs(first / len(plain) - expected) <= STANDARD_ERRORS * spread + 1e-12).all()


def test_gradient_of_the_expected_reward_is_unbiased():
    small = make_small(12, items=12, levels=2, codebook=4, prompts=2)
    value = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameter = small.policy.block.head.weight
    batch = small.batch(1)
    log_prob = all_item_log_probs(small.policy, small.chooser, batch.layout, batch.tokens, batch.prior, NEXT_DISLIKE)
    expected_reward = (log_prob.exp() * value).sum(1).mean() / 2  # the loss divides by levels
    (truth,) = torch.autograd.grad(expected_reward, parameter)
    directions = torch.randn(6, *truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    objective = GRPOObjective(beta=0.0)
    found = []
    for step in range(500):
        _, sampled = draw(small, 3, step)
        loss = distinct_loss(sampled, value[sampled.rollout.items], objective, 2, None, normalised=False).loss
        (gradient,) = torch.autograd.grad(-loss, parameter)
        found.append((directions * gradient).sum((1, 2)).numpy())
    found = np.array(found)
    error = found.std(0) / len(found) ** 0.5
    wanted = (directions * truth).sum((1, 2)).numpy()
    assert (np.abs(found.mean(0) - wanted) < STANDARD_ERRORS * error).all()
    assert (np.abs(wanted) > 2 * error).any()  # the comparison can tell a gradient from none


@pytest.mark.parametrize("normalised", [True, False])
def test_a_sample_of_every_leaf_has_the_exact_gradient(normalised):
    small = make_small(13, items=10, levels=2, codebook=4, prompts=2)
    value = torch.randn(10, dtype=torch.float64)
    parameters = list(small.policy.decoder.layers.parameters()) + list(small.policy.block.parameters())
    batch = small.batch(1)
    log_prob = all_item_log_probs(small.policy, small.chooser, batch.layout, batch.tokens, batch.prior, NEXT_DISLIKE)
    wanted = torch.autograd.grad((log_prob.exp() * value).sum(1).mean() / 2, parameters)
    _, sampled = draw(small, 10)
    loss = distinct_loss(sampled, value[sampled.rollout.items], GRPOObjective(beta=0.0), 2, None, normalised).loss
    found = torch.autograd.grad(-loss, parameters)
    largest = max(w.abs().max() for w in wanted)
    for want, got in zip(wanted, found, strict=True):
        assert (want - got).abs().max() < 1e-9 * largest


def test_the_kl_term_is_the_weighted_divergence_at_visited_nodes():
    small = make_small(14, levels=3)
    _, sampled = draw(small, 5)
    choice, tokens = sampled.rollout.choice, sampled.rollout.tokens
    logits = torch.randn_like(choice.logits)
    reference = log_policy(logits, choice.valid, choice.log_prior, 1.0)
    rewards = torch.zeros(3, 5, dtype=torch.float64)
    loss = distinct_loss(sampled, rewards, GRPOObjective(beta=0.3), 3, logits, normalised=False).loss
    total = 0.0
    log_p = choice.log_probs()
    for row, answer, counted in zip(tokens.row.tolist(), tokens.answer.tolist(), tokens.counted.tolist(), strict=True):
        if counted:
            valid = choice.valid[row]
            p = log_p[row][valid]
            total += sampled.weight.flatten()[answer] * (p.exp() * (p - reference[row][valid])).sum()
    assert abs(loss - 0.3 * total / (3 * 3)) < 1e-10


def test_conditioned_gumbel_keeps_the_maximum_and_the_law():
    log_prob = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log()
    parent = -torch.log(-torch.log(torch.rand(20_000, dtype=torch.float64)))
    noise = -torch.log(-torch.log(torch.rand(20_000, 4, dtype=torch.float64)))
    values = conditioned_gumbel(parent, log_prob.expand(20_000, 4), noise)
    assert (values.max(1).values - parent).abs().max() < 1e-9
    assert torch.isneginf(values[:, 3]).all()
    # with the parent's own law restored the children are independent Gumbels at log_prob
    for k in range(3):
        assert abs(values[:, k].mean() - (log_prob[k] + np.euler_gamma)) < 5 * 1.2826 / 20_000**0.5
        assert abs(values[:, k].std() - 1.2825) < 0.05
    assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.04


def test_weights_stay_finite():
    log_prob = torch.tensor([[-800.0, -30.0, -0.1, -torch.inf]], dtype=torch.float64)
    weight = importance_weight(log_prob, torch.tensor([[-2.0]], dtype=torch.float64))
    assert torch.isfinite(weight).all() and weight[0, 3] == 0
    assert abs(weight[0, 1] - np.exp(-2.0)) < 1e-6  # p far below the threshold: p / q -> exp(kappa)
    exact = importance_weight(log_prob, torch.tensor([[-torch.inf]], dtype=torch.float64))
    assert (exact == log_prob.exp()).all()


@pytest.mark.parametrize("change", [{"loss": "grpo"}, {"loss": "dapo"}, {"set_size": 2}, {"scale_rewards": True}])
def test_what_it_cannot_be_combined_with(change):
    small = make_small(1)
    _, sampled = draw(small, 3)
    rewards = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="without replacement"):
        distinct_loss(sampled, rewards, GRPOObjective(**change), 3, None)
    coefficient, advantage = distinct_advantage(sampled, rewards, True)
    assert (advantage == 0).all() and torch.isfinite(coefficient).all()


@pytest.mark.parametrize("normalised", [True, False])
def test_the_stage_draws_without_replacement(normalised):
    small = make_small(15, levels=3)
    rewards = torch.randn(40, dtype=torch.float64)
    sampled, terms, result, _ = group_loss(
        small.policy,
        freeze(small.policy),
        small.chooser,
        small.batch(6),
        torch.arange(3),
        lambda items: rewards[items][..., None],
        GRPOObjective(beta=0.1),
        6,
        0,
        0,
        sampling="without_replacement",
        normalised=normalised,
    )
    assert all(len(set(row)) == 6 for row in sampled.items.tolist())
    assert result.kl.abs().max() < 1e-9  # the reference is the policy itself
    weights = sampled.weight
    assert (weights.sum(1) - 1).abs().max() < 1e-10
    assert abs(sampled.mean(terms[..., 0]) - (weights * rewards[sampled.items]).sum(1).mean()) < 1e-12
    result.loss.backward()
    assert small.policy.block.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("other", ["objective=full", "loss=dapo", "set_size=2", "scale_rewards=true"])
def test_settings_that_it_cannot_be_combined_with(other):
    alone = ("grpo.sampling=without_replacement", "grpo.set_size=0")
    config = load_config(overrides=(*alone, "grpo.kl=k3", "prior.weight=0", f"grpo.{other}"))
    with pytest.raises(InputError, match="without_replacement"):
        check_combinations(config)
    check_combinations(load_config(overrides=alone))
