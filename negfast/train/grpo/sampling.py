"""Answers without replacement: stochastic beam search on the trie, and estimators that stay unbiased.

Kool et al., "Stochastic Beams and Where to Find Them" (arXiv 1903.06059), and "Buy 4 REINFORCE Samples, Get a Baseline
for Free!" (ICLR 2019 workshop). Every leaf gets its log-probability plus Gumbel noise; the G largest are a sample
without replacement. Top-down, a node holds the largest value below it, and its children's noise is conditioned on that
maximum, so only G + 1 nodes a level are visited. The (G+1)-th value kappa is the threshold: given it, a leaf is in the
sample with probability q = 1 - exp(-exp(log p - kappa)), and p / q is its weight.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from negfast.kernels.trie_grpo import GRPOObjective, GRPOTerms, SampledTokens
from negfast.model.beam import stable_topk
from negfast.model.choice import Choice, TrieChooser
from negfast.model.noise import keyed_gumbel
from negfast.model.policy import Policy
from negfast.model.prompts import PromptBatch
from negfast.train.grpo.loss import CompactRollout, TrieLoss
from negfast.train.grpo.rollout import Rollout


@dataclass(frozen=True)
class DistinctRollout:
    """A rollout whose G answers of a prompt differ.

    Where a prompt has n < G + 1 unseen leaves, all n are answers and their weights are their probabilities: sums over
    the sample are exact expectations. The G - n places left repeat the first answer with weight 0, not counted.

    weight    [B, G] p / q of each answer, detached
    log_prob  [B, G] of each answer, detached
    """

    rollout: Rollout
    weight: Tensor
    log_prob: Tensor


def rollout_without_replacement(
    policy: Policy,
    chooser: TrieChooser,
    batch: PromptBatch,
    request_ids: Tensor,
    branch: int,
    group: int,
    seed: int,
    step: int,
    temperature: float = 1.0,
) -> DistinctRollout:
    """Samples ``group`` different items of every prompt, with gradients; noise is keyed by request and node."""
    layout, trie = batch.layout, chooser.trie
    prompts, levels, device = layout.prompts, trie.levels, batch.tokens.device
    request = torch.arange(prompts, device=device)
    hidden = policy.hidden(layout, batch.tokens, None, prompt_rows="last")
    root = keyed_gumbel(seed, step, request_ids, torch.zeros_like(request_ids), levels, 1)
    value, log_prob = root.to(hidden.dtype), torch.zeros(prompts, 1, dtype=hidden.dtype, device=device)
    nodes = torch.zeros(prompts, 1, dtype=torch.int64, device=device)
    choices: list[Choice] = []
    states: list[Tensor] = []
    visited: list[Tensor] = []  # per level so far, [B, n]: the row of ``choices`` that each present beam went through
    codes: list[Tensor] = []  # and the code it took there
    for level in range(levels):
        beams = nodes.shape[1]
        owner = request.repeat_interleave(beams)
        choice = chooser.choose(policy, hidden, level, nodes.flatten(), owner, batch.prior, branch)
        choices.append(choice)
        states.append(hidden)
        noise = keyed_gumbel(seed, step, request_ids[owner], nodes.flatten(), level, trie.codebook)
        alive = torch.isfinite(value).flatten()
        valid = choice.valid & alive[:, None]
        below = log_prob.flatten()[:, None] + choice.log_probs(temperature).detach()
        values = conditioned_gumbel(value.flatten(), below.masked_fill(~valid, -torch.inf), noise)
        wide = (prompts, beams * trie.codebook)
        value, index = stable_topk(values.view(wide), min(group + 1, wide[1]))
        log_prob = below.masked_fill(~valid, -torch.inf).view(wide).gather(1, index)
        nodes = choice.children.reshape(wide).gather(1, index).clamp_min(0)
        parents = index // trie.codebook
        visited = [rows.gather(1, parents) for rows in visited] + [parents + request[:, None] * beams]
        codes = [code.gather(1, parents) for code in codes] + [index % trie.codebook]
        if level == levels - 1:
            break
        keep = nodes.shape[1]
        slots = torch.arange(prompts * keep, device=device)
        if level == 0:
            layout.set_answers(slots, keep)
        else:
            layout.branch(visited[-1].flatten(), slots, keep)
        tokens = policy.vocabulary.code_base(level + 1) + codes[-1]
        hidden = policy.hidden(layout, None, tokens.reshape(-1, 1))

    missing = group + 1 - nodes.shape[1]
    if missing > 0:  # the trie is smaller than the group
        value, log_prob = (torch.nn.functional.pad(x, (0, missing), value=-torch.inf) for x in (value, log_prob))
        nodes, *rest = (torch.cat([x, x[:, :1].expand(-1, missing)], 1) for x in (nodes, *visited, *codes))
        visited, codes = rest[:levels], rest[levels:]
    alive = torch.isfinite(value[:, :group])
    weight = importance_weight(log_prob[:, :group], value[:, group:]).masked_fill(~alive, 0.0)

    def answers(beams: Tensor) -> Tensor:
        """[B, G + 1] -> [B * G], the first answer's in places that are left."""
        return torch.where(alive, beams[:, :group], beams[:, :1]).flatten()

    sampled = _as_rollout(choices, states, [answers(r) for r in visited], [answers(c) for c in codes], alive)
    items = trie.leaf_item[answers(nodes)].long().view(prompts, group)
    rollout = Rollout(items, *sampled, weight=weight / weight.sum(1, keepdim=True).clamp_min(1e-12))
    return DistinctRollout(rollout, weight, log_prob[:, :group].masked_fill(~alive, -torch.inf))


def _as_rollout(
    choices: list[Choice], states: list[Tensor], visited: list[Tensor], codes: list[Tensor], alive: Tensor
) -> tuple[Tensor, Choice, SampledTokens, Tensor, list[Tensor]]:
    """Rows of the answers alone: one a prompt at level 1, one an answer below it."""
    prompts, group = alive.shape
    answer = torch.arange(prompts * group, device=alive.device)
    owner = answer // group
    picks = [owner[::group], *visited[1:]]
    rows = [owner[::group], *([answer] * (len(choices) - 1))]

    def gather(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor[pick] for tensor, pick in zip(tensors, picks, strict=True)])

    log_priors = [choice.log_prior for choice in choices if choice.log_prior is not None]
    valid = gather([choice.valid for choice in choices])
    merged = Choice(
        gather([choice.logits for choice in choices]),
        valid,
        gather(log_priors) if log_priors else None,
        gather([choice.children for choice in choices]),
    )
    below = [prompts + level * len(answer) + answer for level in range(len(choices) - 1)]
    row = torch.cat([owner, *below])
    counted = (valid.sum(-1) > 1)[row] & alive.flatten().repeat(len(choices))
    tokens = SampledTokens(row, torch.cat(codes), answer.repeat(len(choices)), counted)
    return torch.stack(codes, 1), merged, tokens, gather(states), rows


def conditioned_gumbel(parent: Tensor, log_prob: Tensor, noise: Tensor) -> Tensor:
    """Values [R, K] of children with ``log_prob`` [R, K] (-inf: none) and standard Gumbel ``noise``, conditioned on
    their largest being ``parent`` [R]. Stable form of Kool et al., appendix B.3; -inf where there is no child."""
    exists = torch.isfinite(log_prob)
    free = torch.where(exists, log_prob + noise, -torch.inf)
    largest = free.max(-1, keepdim=True).values
    some = torch.isfinite(largest)
    parent = torch.where(some, parent[:, None], 0.0)
    shifted = torch.where(exists, free, 0.0)
    above = torch.where(exists, shifted - torch.where(some, largest, 0.0), -1.0)
    v = parent - shifted + torch.log(-torch.expm1(above))
    value = parent - v.clamp_min(0) - torch.log1p(torch.exp(-v.abs()))
    return torch.where(exists, value, -torch.inf)


def importance_weight(log_prob: Tensor, kappa: Tensor) -> Tensor:
    """p / q for log p [B, G] and thresholds [B, 1]; where the threshold is -inf q is 1, and 0 where p is."""
    certain = ~torch.isfinite(kappa)
    q = -torch.expm1(-torch.exp(log_prob - torch.where(certain, 0.0, kappa)))
    q = torch.where(certain, 1.0, q)
    # p / q tends to exp(kappa) for p far below it, where q underflows
    ratio = torch.exp(log_prob) / q.clamp_min(torch.finfo(q.dtype).tiny)
    return torch.where(q > 0, ratio, torch.exp(kappa)).masked_fill(~torch.isfinite(log_prob), 0.0)


def distinct_advantage(sampled: DistinctRollout, rewards: Tensor, normalised: bool) -> tuple[Tensor, Tensor]:
    """(coefficient, advantage) [B, G]: the sum of their product times grad log p estimates grad E[reward].

    Un-normalised it is unbiased: coefficient p / q, advantage r (1 - p + p/q) - sum of p/q r. Normalised the weights
    are divided by their sum W (for an answer by W - p/q + p): biased, but of smaller variance, and bounded.
    A sample that holds every leaf is exact either way.
    """
    weight, p = sampled.weight, sampled.log_prob.exp()
    baseline = (weight * rewards).sum(-1, keepdim=True)
    if not normalised:
        return weight, rewards * (1 - p + weight) - baseline
    total = weight.sum(-1, keepdim=True)
    return weight / (total - weight + p).clamp_min(1e-12) * (weight > 0), rewards - baseline / total.clamp_min(1e-12)


def distinct_loss(
    sampled: DistinctRollout,
    rewards: Tensor,
    objective: GRPOObjective,
    levels: int,
    reference: Tensor | None,
    normalised: bool = True,
    compact: CompactRollout | None = None,
) -> GRPOTerms:
    """The on-policy dr_grpo objective, (E[reward] - beta E[KL along the answer]) / levels, from distinct answers.

    Its gradient is that of sampling with replacement in expectation, up to normalisation; ratio 1, nothing is clipped.
    ``reference`` [R, K]: the frozen policy's logits.
    """
    if objective.loss != "dr_grpo" or objective.set_size or objective.scale_rewards:
        raise ValueError("sampling without replacement needs loss dr_grpo, set_size 0 and unscaled rewards")
    coefficient, advantage = distinct_advantage(sampled, rewards, normalised)
    given = replace(objective, baseline="none")
    weight = coefficient.flatten()
    loss = TrieLoss(sampled.rollout, compact, advantage, given, levels, reference, weight)
    terms = loss(sampled.rollout.choice.logits)
    # the coefficients are no mean's weights: undo the division by their sum
    return replace(terms, loss=terms.loss * (coefficient.sum() / len(rewards)))
