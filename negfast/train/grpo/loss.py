"""GRPO's loss of a batch of groups: rollout, reward, reference policy and objective, in one pass over each history.

The objective is computed by the kernel where kernels run, else by its eager reference.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from negfast.config import Grpo
from negfast.errors import InputError
from negfast.kernels.dispatch import runs_liger, runs_triton
from negfast.kernels.trie_grpo import GRPOObjective, GRPOTerms, trie_grpo
from negfast.kernels.trie_grpo_reference import SampledTokens, grpo_terms, k3, trie_grpo_reference
from negfast.kernels.trie_rows import RowTokens
from negfast.kernels.trie_rows_reference import log_policy
from negfast.kernels.vocabulary_cross_entropy import row_entropy, vocabulary_cross_entropy
from negfast.model.choice import TrieChooser
from negfast.model.compact import compact_rows, compact_tables
from negfast.model.histories import Histories
from negfast.model.policy import Policy
from negfast.sid.prior import NEXT_DISLIKE, RequestPrior
from negfast.sid.tokens import CodeVocabulary
from negfast.spans import span
from negfast.train.grpo.graphs import RolloutGraphs
from negfast.train.grpo.rollout import Rollout, logits_of, replay_hidden, replay_logits, rollout, rows_of_levels


class GroupStep(NamedTuple):
    """A rollout, what it earned, and its loss."""

    rollout: Rollout
    reward: Tensor  # [B, G, terms]; their sum is a completion's reward
    terms: GRPOTerms
    reference: Tensor | None  # [R, K] logits of the reference policy, where beta > 0


@dataclass(frozen=True)
class GroupLoss:
    """The loss of groups of ``group`` completions of ``policy``, each sampled on the trie.

    ``reference`` is the frozen policy of the KL, needed where the objective has beta > 0. The default objective takes
    log-probabilities over the codes that the trie allows, with the community prior; ``full`` over the whole vocabulary,
    as general libraries do: every token counts then, forced ones too, and the KL is k3. ``static`` rolls out without
    gradients, with static shapes (on CUDA by graphs), and computes the loss by one pass over all completion tokens:
    fewer launches, for a GPU. Raises ValueError on what cannot be combined.
    """

    policy: Policy
    reference: Policy | None
    chooser: TrieChooser
    objective: GRPOObjective
    group: int
    seed: int  # of the sampling noise
    full: bool = False
    static: bool = False

    def __post_init__(self) -> None:
        if (self.objective.beta > 0) != (self.reference is not None):
            found = f"found {self.reference is not None} with beta {self.objective.beta:g}"
            raise ValueError(f"reference: {found}, expected one exactly where beta is above 0")
        if self.full:
            check_full(self.objective, self.chooser.prior_weight)

    @cached_property
    def graphs(self) -> RolloutGraphs:
        return RolloutGraphs(self.policy, self.reference, self.group)

    def sample(
        self, histories: Histories, request_ids: Tensor, reward: Callable[[Tensor], Tensor], step: int
    ) -> GroupStep:
        """An on-policy step up to its loss. ``request_ids`` int64 [B] key the noise, with ``step``; ``reward`` gives
        the reward's terms [B, G, n] of items int64 [B, G]."""
        graphs = self.graphs.load(histories) if self.static else None
        sampled = rollout(
            self.policy,
            self.chooser,
            histories,
            request_ids,
            NEXT_DISLIKE,
            self.group,
            self.seed,
            step,
            self.objective.temperature,
            keep_forced=self.full,
            static=self.static,
            graphs=graphs,
        )
        if self.static:
            histories.layout.keys.clear()  # the pass that trains makes its own
            hidden = replay_hidden(self.policy, histories, sampled)
            sampled = replace(
                sampled, hidden=hidden, choice=replace(sampled.choice, logits=logits_of(self.policy, hidden, sampled))
            )
        prior = histories.prior
        assert prior is not None
        earned, reference = reward(sampled.items), None
        if self.reference is not None:
            with span("reference"), torch.no_grad():
                if graphs is None:
                    frozen = replay_hidden(self.reference, histories.fresh(), sampled)
                else:
                    frozen = rows_of_levels(graphs.of_reference(), self.group)
                if self.full:
                    reference = self.reference.full_logits(frozen)
                else:
                    reference = logits_of(self.reference, frozen, sampled)
        with span("loss"):
            if self.full:
                terms = self._over_vocabulary(sampled, earned.sum(-1), reference)
            else:
                terms = self._over_trie(prior, sampled, sampled.choice.logits, earned.sum(-1), reference, None)
        return GroupStep(sampled, earned, terms, reference)

    def reuse(self, histories: Histories, taken: GroupStep) -> GRPOTerms:
        """The loss of an earlier rollout under the policy as it is now, by a second pass, with ratios against then."""
        logits = replay_logits(self.policy, histories, taken.rollout)
        prior = histories.prior
        assert prior is not None
        rewards, old_log_prob = taken.reward.sum(-1), taken.terms.log_prob
        with span("loss"):
            return self._over_trie(prior, taken.rollout, logits, rewards, taken.reference, old_log_prob)

    def _over_trie(
        self,
        prior: RequestPrior,
        sampled: Rollout,
        logits: Tensor,
        rewards: Tensor,
        reference: Tensor | None,
        old_log_prob: Tensor | None,
    ) -> GRPOTerms:
        """Terms with tokens [T] flat, level by level, of ``logits`` [R, K] at the nodes of a rollout; ``old_log_prob``
        [T] of the policy that sampled, else on-policy.

        A reward that is not finite makes the loss so, which the training loop refuses; to look here would make the
        host wait for the device.
        """
        choice, tokens, levels = sampled.choice, sampled.tokens, sampled.codes.shape[1]
        if not runs_triton(logits.device, "trie_grpo"):
            if reference is not None:
                reference = log_policy(reference, choice.valid, choice.log_prior, self.objective.temperature)
            return trie_grpo_reference(
                logits,
                choice.valid,
                choice.log_prior,
                tokens,
                rewards,
                self.objective,
                levels,
                reference,
                old_log_prob,
            )
        tables, items = compact_tables(self.chooser, prior), sampled.items.flatten()
        nodes, requests = [torch.zeros_like(sampled.rows[0])], [sampled.rows[0]]
        for level, completions in enumerate(sampled.rows[1:]):
            nodes.append(self.chooser.trie.item_nodes[items[completions], level].long())
            requests.append(completions // self.group)
        shape, real = (levels, len(items)), torch.float32
        row, code, counted = (x.view(shape) for x in (tokens.row, tokens.code, tokens.counted))
        terms = trie_grpo(
            logits,
            tables,
            compact_rows(self.chooser, tables, prior, NEXT_DISLIKE, nodes, requests),
            RowTokens.build(row, code, counted, len(choice.logits)),
            rewards.to(real),
            self.objective,
            reference=None if reference is None else reference.to(logits.dtype),
            old_log_prob=None if old_log_prob is None else old_log_prob.to(real).view(shape),
            check_rewards=False,
        )
        return GRPOTerms(terms.loss, *(term.flatten() for term in terms.per_token))

    def _over_vocabulary(self, sampled: Rollout, rewards: Tensor, reference: Tensor | None) -> GRPOTerms:
        """Terms over the whole vocabulary; ``reference`` [R, V]."""
        policy, objective = self.policy, self.objective
        tokens, levels = vocabulary_tokens(policy.vocabulary, sampled), sampled.codes.shape[1]
        if not runs_liger(sampled.hidden.device):
            logits = policy.full_logits(sampled.hidden)
            valid = torch.ones_like(logits, dtype=torch.bool)
            if reference is not None:
                reference = log_policy(reference, valid, None, objective.temperature)
            return trie_grpo_reference(logits, valid, None, tokens, rewards, objective, levels, reference)
        # Liger knows one target a row: a request's row at level 1 is repeated for each of its completions
        logits = policy.full_logits(sampled.hidden[tokens.row]) / objective.temperature
        entropy = row_entropy(logits)  # first, since Liger leaves gradients in the logits' memory
        log_prob = -vocabulary_cross_entropy(logits, tokens.code)
        kl = torch.zeros_like(log_prob)
        if reference is not None:
            frozen = reference.float() / objective.temperature
            kl = k3(log_prob, frozen[tokens.row, tokens.code] - frozen.logsumexp(-1)[tokens.row])
        return grpo_terms(log_prob, kl, entropy, tokens, rewards, objective, levels)


def objective_of(settings: Grpo) -> GRPOObjective:
    """The stage's objective. InputError where the settings contradict each other."""
    try:
        return GRPOObjective(
            loss=settings.loss,
            scale_rewards=settings.scale_rewards,
            set_size=settings.set_size,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            beta=settings.beta,
            kl=settings.kl,
            temperature=settings.temperature,
        )
    except ValueError as error:
        raise InputError(f"grpo: {error}") from error


def check_full(objective: GRPOObjective, prior_weight: float) -> None:
    """ValueError where an objective over the whole vocabulary cannot be computed: it knows neither nodes nor prior."""
    if objective.beta and objective.kl != "k3":
        raise ValueError(f"kl: found {objective.kl}, expected k3 with the full objective")
    if prior_weight:
        raise ValueError(f"prior weight: found {prior_weight:g}, expected 0 with the full objective")


def vocabulary_tokens(vocabulary: CodeVocabulary, sampled: Rollout) -> SampledTokens:
    """The tokens of a rollout as choices among the whole vocabulary: ids instead of codes, all of them counted."""
    tokens, completions = sampled.tokens, len(sampled.codes)
    first = vocabulary.code_bases(tokens.code.device)
    return SampledTokens(
        tokens.row,
        tokens.code + first.repeat_interleave(completions),
        tokens.completion,
        torch.ones_like(tokens.counted),
    )
