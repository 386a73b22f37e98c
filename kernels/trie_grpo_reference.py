"""The GRPO loss of completions sampled on a trie: the one eager reference of the formula.

Symbols: R rows, each the policy's choice among K codes at one visited node of one prompt's trie; B groups of
G completions; T sampled tokens. A row serves every token sampled at it: the root of a prompt is one row for G
tokens. All shapes are static; a forced token (a node with one unseen child, log p = 0) is marked as not counted
and enters neither sums nor denominators.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import comb

import torch
from torch import Tensor

from negfast.kernels.trie_rows_reference import log_policy

LOSSES = ("grpo", "dr_grpo", "dapo")
KLS = ("exact", "k3")


@dataclass(frozen=True)
class GRPOObjective:
    """What GRPO maximises. From GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), PKPO (2505.15201).

    loss        grpo: mean over the counted tokens of a completion, then over completions; dr_grpo: sum over tokens
                divided by (completions * levels), a constant; dapo: mean over all counted tokens.
    scale_rewards  divide the advantage by the group's standard deviation. Off by default (Dr. GRPO): most groups
                hold no hit, and division would inflate their crumbs of reward.
    set_size    0: a completion's advantage is its reward minus the group's mean. k >= 1: the leave-one-out estimate
                of max@k (PKPO), since FHR@K is a property of the set.
    clip_low, clip_high   the probability ratio is clipped to [1 - clip_low, 1 + clip_high].
    beta, kl    weight of KL(policy || reference). "exact" sums over the codes of each visited node; its gradient
                omits the sampling term (how the choice of visited nodes depends on the policy). "k3" is the
                estimator of the sampled code alone.
    temperature divides logits plus prior, in sampling and training alike.
    """

    loss: str = "dr_grpo"
    scale_rewards: bool = False
    set_size: int = 0
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    kl: str = "exact"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: found {self.loss!r}, expected one of {', '.join(LOSSES)}")
        if self.kl not in KLS:
            raise ValueError(f"kl: found {self.kl!r}, expected one of {', '.join(KLS)}")
        if self.set_size < 0 or self.temperature <= 0 or self.beta < 0:
            raise ValueError("set_size and beta must be >= 0 and temperature > 0")
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise ValueError("clip_low must lie in [0, 1) and clip_high be >= 0")
        if self.set_size and self.scale_rewards:
            raise ValueError("scale_rewards cannot be combined with set_size: max@k has a baseline of its own")


@dataclass(frozen=True)
class SampledTokens:
    """The tokens of B*G completions, level by level; token n of T = L*B*G.

    row         int64 [T]  row of ``logits`` at which the token was sampled
    code        int64 [T]  the sampled code, in [0, K)
    completion  int64 [T]  the completion it belongs to, in [0, B*G)
    counted     bool  [T]  False for forced tokens and padding
    """

    row: Tensor
    code: Tensor
    completion: Tensor
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


def group_advantage(rewards: Tensor, objective: GRPOObjective) -> Tensor:
    """Advantage [B, G] of rewards [B, G].

    Raises ValueError where a group is smaller than ``set_size``, and on the CPU on NaN or inf in rewards; elsewhere the
    host would wait for the device.
    """
    if rewards.device.type == "cpu" and not torch.isfinite(rewards).all():
        raise ValueError("rewards: found NaN or inf, expected finite numbers")
    if objective.set_size:
        return max_at_k_advantage(rewards, objective.set_size)
    centred = rewards - rewards.mean(-1, keepdim=True)
    if not objective.scale_rewards or rewards.shape[-1] == 1:
        return centred
    return centred / (rewards.std(-1, keepdim=True) + 1e-4)


def max_at_k_advantage(rewards: Tensor, k: int) -> Tensor:
    """Advantage [B, G] whose policy gradient, averaged over a group, is unbiased for that of E[max of k completions].

    PKPO's leave-one-out form: what completion i adds to a set of k is its reward minus the best of the other k - 1,
    averaged over all such sets, times k. For k = 1 the baseline is the mean of the other completions (RLOO).
    """
    size = rewards.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(f"set_size: found {k}, expected 1 to the group size {size}")
    if k == 1:
        others = (rewards.sum(-1, keepdim=True) - rewards) / max(size - 1, 1)
        return rewards - others
    # Sorted ascending, completion m is the best of comb(m, k - 2) sets of k - 1 completions; only sets whose best lies
    # below completion i leave it anything to add.
    ordered, order = rewards.sort(dim=-1)
    share = set_shares_on(rewards.device, rewards.dtype, size, k)
    below = share[:, None].expand(size, size).triu(1)  # of m < i, in column i; a product, as CUDA's cumsum is unordered
    return torch.empty_like(rewards).scatter_(-1, order, below.sum(0) * ordered - ordered @ below)


def set_shares(size: int, k: int) -> list[float]:
    """For m = 0..size-1: k times the share of all sets of k - 1 other completions whose best is the m-th from below.

    Divided as integers, since binomials of large groups overflow any float.
    """
    return [k * comb(m, k - 2) / comb(size - 1, k - 1) for m in range(size)]


@lru_cache(maxsize=8)
def set_shares_on(device: torch.device, dtype: torch.dtype, size: int, k: int) -> Tensor:
    """`set_shares` as a tensor [size]. Kept, since the host waits until it is copied."""
    return torch.tensor(set_shares(size, k), dtype=dtype, device=device)


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
) -> GRPOTerms:
    """GRPO's loss with clipping and KL over the trie, in float32, or float64 where ``logits`` are (for tests).

    logits [R, K], valid bool [R, K], log_prior [R, K] or None; rewards [B, G]; reference_log_policy [R, K] the frozen
    policy's ``log_policy`` at the same rows (needed where beta > 0); old_log_prob [T] of the policy that sampled
    (None: on-policy, ratio 1).
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
    return grpo_terms(log_prob, kl, entropy, tokens, rewards, objective, levels, old_log_prob)


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
) -> GRPOTerms:
    """The objective from what is known of each token, [T]: its log-probability (0 where not counted), the KL and the
    entropy at its row; the rest as ``trie_grpo_reference``."""
    dtype = log_prob.dtype
    old = log_prob.detach() if old_log_prob is None else torch.where(tokens.counted, old_log_prob, 0.0)
    advantage = group_advantage(rewards, objective).reshape(-1)[tokens.completion].to(dtype)
    ratio = (log_prob - old).exp()
    bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    clipped = (bounded * advantage < ratio * advantage).to(dtype) * tokens.counted
    kl = torch.where(tokens.counted, kl, 0.0)
    weight = token_weight(tokens, rewards.numel(), levels, objective, dtype)
    loss = (weight * (objective.beta * kl - gain)).sum()
    return GRPOTerms(loss, log_prob.detach(), kl.detach(), (entropy * tokens.counted).detach(), clipped.detach())


def token_weight(
    tokens: SampledTokens, completions: int, levels: int, objective: GRPOObjective, dtype: torch.dtype
) -> Tensor:
    """The coefficient [T] of each token's term in the loss; 0 where not counted."""
    counted = tokens.counted.to(dtype)
    if objective.loss == "dr_grpo":
        return counted / (completions * levels)
    if objective.loss == "dapo":
        return counted / counted.sum().clamp_min(1e-12)
    length = torch.zeros(completions, dtype=dtype, device=counted.device)
    length.index_put_((tokens.completion,), counted, accumulate=True)
    return counted / (length.clamp_min(1)[tokens.completion] * completions)
