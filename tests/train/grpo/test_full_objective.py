"""The full objective against the formula that TRL publishes, written out anew over padded tensors."""

from dataclasses import replace

import pytest
import torch

from negfast.config import Config, load_config
from negfast.errors import InputError
from negfast.kernels.trie_grpo import GRPOObjective
from negfast.train.combinations import check_combinations
from negfast.train.grpo.loss import GroupLoss
from negfast.train.grpo.stage import freeze
from tests.train.small import make_small

BETA, GROUP = 0.1, 5


def trl_loss(logps, reference, rewards, loss, scale, levels):
    """logps, reference [B*G, L] of the sampled tokens; rewards [B, G]. GRPOTrainer._compute_loss, on-policy, k3."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    advantages = advantages.reshape(-1, 1)
    ratio = torch.exp(logps - logps.detach())
    per_token = -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    per_token = per_token + BETA * (torch.exp(reference - logps) - (reference - logps) - 1)
    if loss == "grpo":
        return (per_token.sum(-1) / levels).mean()
    if loss == "dr_grpo":
        return per_token.sum() / (len(per_token) * levels)
    return per_token.sum() / per_token.numel()


def separate_log_probs(policy, small, codes):
    """Full-vocabulary log p of each code by a forward of history, marker and codes alone, [B*G, L]."""
    policy.decoder.set_attn_implementation("sdpa")
    rows = []
    for a, completion in enumerate(codes):
        b = a // GROUP
        ids = completion + torch.tensor([policy.vocabulary.code_base(k + 1) for k in range(len(completion))])
        history = small.tokens[small.cu_seqlens[b] : small.cu_seqlens[b + 1]]
        marker = torch.stack([torch.tensor(policy.vocabulary.marker("next-dislike")), small.gap[b]])
        embedded = torch.cat([policy.embed(history), policy.embed(marker[None]), policy.embed(ids)])
        out = policy.decoder(inputs_embeds=embedded[None], use_cache=False)
        logits = policy.full_logits(out.last_hidden_state[0, len(history) : -1])
        rows.append(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    policy.decoder.set_attn_implementation("negfast_group")
    return torch.stack(rows)


@pytest.mark.parametrize("loss,scale", [("grpo", False), ("dr_grpo", True), ("dapo", False)])
def test_loss_and_gradient_are_those_of_the_published_formula(loss, scale):
    small = make_small(6, items=30, levels=4, codebook=4)  # many forced tokens: they count here
    chooser = replace(small.chooser, prior_weight=0.0)
    reference = freeze(small.policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    rewards = torch.randn(3, GROUP, dtype=torch.float64)
    objective = GRPOObjective(loss=loss, scale_rewards=scale, beta=BETA, kl="k3")
    ids = torch.arange(3)
    loss_of = GroupLoss(small.policy, reference, chooser, objective, GROUP, 0, full=True)
    sampled, _, result, _ = loss_of.sample(small.histories(), ids, lambda _: rewards[..., None], 0)

    logps = separate_log_probs(small.policy, small, sampled.codes)
    with torch.no_grad():
        reference_logps = separate_log_probs(reference, small, sampled.codes)
    expected = trl_loss(logps, reference_logps, rewards, loss, scale, 4)
    assert abs(result.loss - expected) < 1e-6  # the norms of the stock model work in fp32
    parameters = list(small.policy.decoder.layers.parameters()) + list(small.policy.block.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    found = torch.autograd.grad(result.loss, parameters)
    for want, got in zip(wanted, found, strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(w.abs().max() for w in wanted)


def test_what_the_full_objective_cannot_be_combined_with():
    config = load_config(overrides=("grpo.objective=full", "grpo.kl=k3"))
    with pytest.raises(InputError, match="prior weight"):
        check_combinations(config)
    check_combinations(load_config(overrides=("grpo.objective=full", "grpo.kl=k3", "prior.weight=0")))
    exact = load_config(overrides=("grpo.objective=full", "prior.weight=0"))
    with pytest.raises(InputError, match="kl: found exact"):
        check_combinations(exact)
    small = make_small(1)
    with pytest.raises(ValueError, match="k3"):
        GroupLoss(small.policy, small.policy, small.chooser, GRPOObjective(), 2, 0, full=True)


@pytest.mark.parametrize(
    "override,key",
    [("grpo.set_size=65", "grpo.set_size"), ("grpo.scale_rewards=true", "scale_rewards")],
)
def test_settings_that_contradict_each_other_are_refused(override, key):
    config = load_config(overrides=("grpo.set_size=4", override))
    with pytest.raises(InputError, match=key):
        check_combinations(config)
    check_combinations(Config())
