"""GRPO's objective at the nodes that a rollout visited: by the kernel where kernels run, else in eager code."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from negfast.kernels.dispatch import runs_triton
from negfast.kernels.fused_trie_grpo import trie_grpo
from negfast.kernels.trie_grpo import GRPOObjective, GRPOTerms, log_policy, trie_grpo_reference
from negfast.kernels.trie_rows import RowTokens, TrieRows, TrieTables
from negfast.model.choice import TrieChooser
from negfast.model.compact import compact_rows, compact_tables
from negfast.sid.prior import RequestPrior
from negfast.train.grpo.rollout import Rollout


class CompactRollout(NamedTuple):
    """The choices and tokens of a rollout as kernels read them."""

    tables: TrieTables
    rows: TrieRows
    tokens: RowTokens


def compact_rollout(chooser: TrieChooser, prior: RequestPrior, branch: int, sampled: Rollout) -> CompactRollout | None:
    """None where the eager reference computes: it reads the dense form that sampling made."""
    if not runs_triton(sampled.items.device):
        return None
    items, group = sampled.items.flatten(), sampled.items.shape[1]
    nodes, requests = [torch.zeros_like(sampled.rows[0])], [sampled.rows[0]]
    for level, answers in enumerate(sampled.rows[1:]):
        nodes.append(chooser.trie.item_nodes[items[answers], level].long())
        requests.append(answers // group)
    tables = compact_tables(chooser, prior)
    shape = (chooser.trie.levels, len(items))
    row, counted = sampled.tokens.row.view(shape), sampled.tokens.counted.view(shape)
    rows = compact_rows(tables, prior, branch, nodes, requests)
    return CompactRollout(tables, rows, RowTokens.from_rows(row, counted, len(sampled.choice.logits)))


@dataclass(frozen=True)
class TrieLoss:
    """The objective at the rows of a rollout: all of it but the policy's logits there.

    rewards    [B, G]
    reference  [R, K] logits of the frozen policy at the same rows; needed where beta > 0
    answer_weight  [B * G] or None
    """

    sampled: Rollout
    compact: CompactRollout | None
    rewards: Tensor
    objective: GRPOObjective
    levels: int
    reference: Tensor | None
    answer_weight: Tensor | None = None

    def __call__(self, logits: Tensor, old_log_prob: Tensor | None = None) -> GRPOTerms:
        """Terms with tokens [T] flat, level by level; ``old_log_prob`` [T] of the policy that sampled, else on-policy.

        A reward that is not finite makes the loss so, which the training loop refuses; to look here would make the
        host wait for the device.
        """
        if self.compact is None:
            return self._eager(logits, old_log_prob)
        tables, rows, row_tokens = self.compact
        tokens, shape = self.sampled.tokens, (self.levels, self.rewards.numel())
        real = torch.float32
        terms = trie_grpo(
            logits,
            tables,
            rows,
            row_tokens,
            tokens.code.int().view(shape),
            tokens.counted.view(shape),
            self.rewards.to(real),
            self.objective,
            None if self.reference is None else self.reference.to(logits.dtype),
            old_log_prob=None if old_log_prob is None else old_log_prob.to(real).view(shape),
            answer_weight=None if self.answer_weight is None else self.answer_weight.to(real),
            check_rewards=False,
        )
        return GRPOTerms(terms.loss, *(term.flatten() for term in terms.per_token))

    def _eager(self, logits: Tensor, old_log_prob: Tensor | None) -> GRPOTerms:
        choice, reference = self.sampled.choice, self.reference
        if reference is not None:
            reference = log_policy(reference, choice.valid, choice.log_prior, self.objective.temperature)
        return trie_grpo_reference(
            logits,
            choice.valid,
            choice.log_prior,
            self.sampled.tokens,
            self.rewards,
            self.objective,
            self.levels,
            reference,
            old_log_prob,
            self.answer_weight,
        )
