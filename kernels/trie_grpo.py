"""The GRPO loss of answers sampled on a trie: the one eager reference of the formula.

Symbols: R rows, each the policy's choice among K codes at one visited node of one prompt's trie; B groups of
G answers; T sampled tokens. A row serves every token sampled at it: the root of a prompt is one row for G
tokens. All shapes are static; a forced token (a node with one unseen child, log p = 0) is marked as not counted
and enters neither sums nor denominators.
"""

from dataclasses import dataclass
from math import comb
from typing import Literal

import torch
from torch import Tensor

LOSSES = ("grpo", "dr_grpo", "dapo")
KLS = ("exact", "k3")
BASELINES = ("group", "none")


@dataclass(frozen=True)
class GRPOObjective:
    """What GRPO maximises. From GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), PKPO (2505.15201).

    loss        grpo: mean over the counted tokens of an answer, then over answers; dr_grpo: sum over tokens divided
                by (answers * levels), a constant; dapo: mean over all counted tokens.
    scale_rewards  divide the advantage by the group's standard deviation. Off by default (Dr. GRPO): most groups
                hold no hit, and division would inflate their crumbs of reward.
    set_size    0: an answer's advantage is its own. k >= 1: the leave-one-out estimate of max@k (PKPO), since FHR@K
                is a property of the set.
    baseline    group: an advantage is the reward minus the group's mean; none: rewards are advantages as they are.
    clip_low, clip_high   the probability ratio is clipped to [1 - clip_low, 1 + clip_high].
    beta, kl    weight of KL(policy || reference). "exact" sums over the codes of each visited node; its gradient
                omits the sampling term (how the choice of visited nodes depends on the policy). "k3" is the
                estimator of the sampled code alone.
    temperature divides logits plus prior, in sampling and training alike.
    """

    loss: Literal["grpo", "dr_grpo", "dapo"] = "dr_grpo"
    scale_rewards: bool = False
    set_size: int = 0
    baseline: Literal["group", "none"] = "group"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    kl: Literal["exact", "k3"] = "exact"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: found {self.loss!r}, expected one of {', '.join(LOSSES)}")
        if self.kl not in KLS:
            raise ValueError(f"kl: found {self.kl!r}, expected one of {', '.join(KLS)}")
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline: found {self.baseline!r}, expected one of {', '.join(BASELINES)}")
        if self.baseline == "none" and (self.set_size or self.scale_rewards):
            raise ValueError("baseline none cannot be combined with set_size or scale_rewards")
        if self.set_size < 0 or self.temperature <= 0 or self.beta < 0:
            raise ValueError("set_size and beta must be >= 0 and temperature > 0")
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise ValueError("clip_low must lie in [0, 1) and clip_high be >= 0")
        if self.set_size and self.scale_rewards:
            raise ValueError("scale_rewards cannot be combined with set_size: max@k has a baseline of its own")


@dataclass(frozen=True)
class SampledTokens:
    """The tokens of B*G answers, level by level; token n of T = L*B*G.

    row      int64 [T]  row of ``logits`` at which the token was sampled
    code     int64 [T]  the sampled code, in [0, K)
    answer   int64 [T]  the answer it belongs to, in [0, B*G)
    counted  bool  [T]  False for forced tokens and padding
    """

    row: Tensor
    code: Tensor
    answer: Tensor
    counted: Tensor


@dataclass(frozen=True)
class GRPOTerms:
    """``loss`` is a scalar with a gradient; the rest is detached, per token [T], zero where not counted."""

    loss: Tensor
    log_prob: Tensor
    kl: Tensor
    entropy: Tensor
    clipped: Tensor

    @property
    def per_token(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.log_prob, self.kl, self.entropy, self.clipped


def log_policy(logits: Tensor, valid: Tensor, log_prior: Tensor | None, temperature: float) -> Tensor:
    """Log-probabilities [R, K] of the policy renormalised over the valid codes, in float32 or float64; -inf elsewhere.

    A row without a valid code (padding) gets zeros, so that it can be carried along without NaN.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = scores if log_prior is None else scores + log_prior
    scores = (scores / temperature).masked_fill(~valid, -torch.inf)
    scores = torch.where(valid.any(-1, keepdim=True), scores, 0.0)
    return torch.log_softmax(scores, dim=-1)


def group_advantage(rewards: Tensor, objective: GRPOObjective) -> Tensor:
    """Advantage [B, G] of rewards [B, G].

    Raises ValueError on NaN or inf in rewards, and where a group is smaller than ``set_size``.
    """
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards: found NaN or inf, expected finite numbers")
    if objective.baseline == "none":
        return rewards
    if objective.set_size:
        return max_at_k_advantage(rewards, objective.set_size)
    centred = rewards - rewards.mean(-1, keepdim=True)
    if not objective.scale_rewards or rewards.shape[-1] == 1:
        return centred
    return centred / (rewards.std(-1, keepdim=True) + 1e-4)


def max_at_k_advantage(rewards: Tensor, k: int) -> Tensor:
    """Advantage [B, G] whose policy gradient, averaged over a group, is unbiased for that of E[max of k answers].

    PKPO's leave-one-out form: what answer i adds to a set of k is its reward minus the best of the other k - 1,
    averaged over all such sets, times k. For k = 1 the baseline is the mean of the other answers (RLOO).
    """
    size = rewards.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(f"set_size: found {k}, expected 1 to the group size {size}")
    if k == 1:
        others = (rewards.sum(-1, keepdim=True) - rewards) / max(size - 1, 1)
        return rewards - others
    # Sorted ascending, answer m is the best of comb(m, k - 2) sets of k - 1 answers; only sets whose best lies
    # below answer i leave it anything to add.
    ordered, order = rewards.sort(dim=-1)
    share = torch.tensor(set_shares(size, k), dtype=rewards.dtype, device=rewards.device)
    share_below = share.cumsum(0) - share
    best_below = (share * ordered).cumsum(-1) - share * ordered
    return torch.empty_like(rewards).scatter_(-1, order, share_below * ordered - best_below)


def set_shares(size: int, k: int) -> list[float]:
    """For m = 0..size-1: k times the share of all sets of k - 1 other answers whose best is the m-th from below.

    Divided as integers, since binomials of large groups overflow any float.
    """
    return [k * comb(m, k - 2) / comb(size - 1, k - 1) for m in range(size)]


def trie_grpo_reference(
    logits: Tensor,
    valid: Tensor,
    log_prior: Tensor | None,
    tokens: SampledTokens,
    rewards: Tensor,
    objective: GRPOObjective,
    levels: int,
    reference_log_policy: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    answer_weight: Tensor | None = None,
) -> GRPOTerms:
    """GRPO's loss with clipping and KL over the trie, in float32, or float64 where ``logits`` are (for tests).

    logits [R, K], valid bool [R, K], log_prior [R, K] or None; rewards [B, G]; reference_log_policy [R, K] the frozen
    policy's ``log_policy`` at the same rows (needed where beta > 0); old_log_prob [T] of the policy that sampled
    (None: on-policy, ratio 1); answer_weight [B*G] multiplies an answer's tokens in loss and denominators.
    """
    if objective.beta > 0 and reference_log_policy is None:
        raise ValueError("reference_log_policy: found None, expected log-probabilities since beta > 0")
    log_p = log_policy(logits, valid, log_prior, objective.temperature)
    log_prob = torch.where(tokens.counted, log_p[tokens.row, tokens.code], 0.0)

    # 0 * log 0 = 0: masked codes hold -inf
    finite = log_p.masked_fill(~valid, 0.0)
    p = finite.exp().masked_fill(~valid, 0.0)
    entropy = -(p * finite).sum(-1)[tokens.row]
    kl = torch.zeros_like(log_prob)
    if reference_log_policy is not None and objective.beta > 0:
        reference = reference_log_policy.masked_fill(~valid, 0.0)
        if objective.kl == "exact":
            kl = (p * (finite - reference)).sum(-1)[tokens.row]
        else:
            kl = k3(log_prob, torch.where(tokens.counted, reference[tokens.row, tokens.code], 0.0))
    return grpo_terms(log_prob, kl, entropy, tokens, rewards, objective, levels, old_log_prob, answer_weight)


def k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimator of KL(policy || reference) from the log-probabilities of sampled tokens alone."""
    log_ratio = reference - log_prob
    return log_ratio.exp() - log_ratio - 1


def grpo_terms(
    log_prob: Tensor,
    kl: Tensor,
    entropy: Tensor,
    tokens: SampledTokens,
    rewards: Tensor,
    objective: GRPOObjective,
    levels: int,
    old_log_prob: Tensor | None = None,
    answer_weight: Tensor | None = None,
) -> GRPOTerms:
    """The objective from what is known of each token, [T]: its log-probability (0 where not counted), the KL and the
    entropy at its row; the rest as ``trie_grpo_reference``."""
    dtype = log_prob.dtype
    old = log_prob.detach() if old_log_prob is None else torch.where(tokens.counted, old_log_prob, 0.0)
    advantage = group_advantage(rewards, objective).reshape(-1)[tokens.answer].to(dtype)
    ratio = (log_prob - old).exp()
    bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    clipped = (bounded * advantage < ratio * advantage).to(dtype) * tokens.counted
    kl = torch.where(tokens.counted, kl, 0.0)
    weight = token_weight(tokens, rewards.numel(), levels, objective, dtype, answer_weight)
    loss = (weight * (objective.beta * kl - gain)).sum()
    return GRPOTerms(loss, log_prob.detach(), kl.detach(), (entropy * tokens.counted).detach(), clipped.detach())


def token_weight(
    tokens: SampledTokens,
    answers: int,
    levels: int,
    objective: GRPOObjective,
    dtype: torch.dtype,
    answer_weight: Tensor | None = None,
) -> Tensor:
    """The coefficient [T] of each token's term in the loss; 0 where not counted."""
    counted = tokens.counted.to(dtype)
    per_answer = torch.ones(answers, dtype=dtype, device=counted.device) if answer_weight is None else answer_weight
    weighted = counted * per_answer[tokens.answer]
    if objective.loss == "dr_grpo":
        return weighted / (per_answer.sum() * levels)
    if objective.loss == "dapo":
        return weighted / weighted.sum().clamp_min(1e-12)
    length = torch.zeros(answers, dtype=dtype, device=counted.device).index_add(0, tokens.answer, counted)
    return weighted / (length.clamp_min(1)[tokens.answer] * per_answer.sum())
