"""GRPO's objective over the whole vocabulary, as general libraries train it, of answers sampled on the trie."""

import torch
from torch import Tensor

from negfast.kernels.dispatch import runs_liger
from negfast.kernels.trie_grpo import (
    GRPOObjective,
    GRPOTerms,
    SampledTokens,
    grpo_terms,
    k3,
    log_policy,
    trie_grpo_reference,
)
from negfast.kernels.vocabulary import row_entropy, vocabulary_nll
from negfast.model.policy import Policy
from negfast.sid.tokens import CodeVocabulary
from negfast.train.grpo.rollout import Rollout


def full_loss(
    policy: Policy, sampled: Rollout, rewards: Tensor, objective: GRPOObjective, reference: Tensor | None
) -> GRPOTerms:
    """The objective at hidden states of a rollout; every token counts, the KL is k3. ``reference`` [R, V]: the frozen
    policy's logits where beta > 0, else None."""
    if (objective.beta > 0) != (reference is not None):
        raise ValueError(
            f"reference: found {reference is not None} with beta {objective.beta:g}, expected both or none"
        )
    tokens, levels = vocabulary_tokens(policy.vocabulary, sampled), sampled.codes.shape[1]
    if not runs_liger(sampled.hidden.device):
        logits = policy.full_logits(sampled.hidden)
        valid = torch.ones_like(logits, dtype=torch.bool)
        if reference is not None:
            reference = log_policy(reference, valid, None, objective.temperature)
        return trie_grpo_reference(logits, valid, None, tokens, rewards, objective, levels, reference)
    # Liger knows one target a row: a prompt's row at level 1 is repeated for each of its answers
    logits = policy.full_logits(sampled.hidden[tokens.row]) / objective.temperature
    entropy = row_entropy(logits)  # first, since Liger leaves gradients in the logits' memory
    log_prob = -vocabulary_nll(logits, tokens.code)
    kl = torch.zeros_like(log_prob)
    if reference is not None:
        frozen = reference.float() / objective.temperature
        kl = k3(log_prob, frozen[tokens.row, tokens.code] - frozen.logsumexp(-1)[tokens.row])
    return grpo_terms(log_prob, kl, entropy, tokens, rewards, objective, levels)


def vocabulary_tokens(vocabulary: CodeVocabulary, sampled: Rollout) -> SampledTokens:
    """The tokens of a rollout as choices among the whole vocabulary: ids instead of codes, all of them counted."""
    tokens, (answers, levels) = sampled.tokens, sampled.codes.shape
    first = torch.tensor([vocabulary.code_base(level + 1) for level in range(levels)], device=tokens.code.device)
    return SampledTokens(
        tokens.row, tokens.code + first.repeat_interleave(answers), tokens.answer, torch.ones_like(tokens.counted)
    )
