"""Stage 3, progressive GRPO on the trie: sample a group of items for each request, reward them, one update.

The reference policy is the frozen policy that the stage starts from; the verdict's loss stays, that on both branches
may (`grpo.sft_weight`).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from negfast.config import Config
from negfast.data.neighbours import co_dislike_neighbours, content_neighbours
from negfast.data.split import only_next
from negfast.errors import InputError
from negfast.kernels.trie_grpo import GRPOObjective, GRPOTerms
from negfast.model.choice import TrieChooser
from negfast.model.policy import Policy
from negfast.model.prompts import PromptBatch
from negfast.runtime import distributed, sharding
from negfast.runtime.engine import Engine
from negfast.sid.prior import NEXT_DISLIKE
from negfast.spans import span
from negfast.staging import put
from negfast.train.grpo.full_loss import full_loss
from negfast.train.grpo.loss import TrieLoss, compact_rollout
from negfast.train.grpo.reward import COLLABORATIVE, HIT, LIKED, RewardTable, build_reward_table
from negfast.train.grpo.rollout import Rollout, replay_hidden, replay_logits, rollout
from negfast.train.grpo.sampling import distinct_loss, rollout_without_replacement
from negfast.train.grpo.schedule import ViewSchedule, history_bucket, measure_views
from negfast.train.order import epoch_rows, task_rng
from negfast.train.sft import ItemBatch, NextItems
from negfast.train.step import WHOLE, Mean, Share, StepResult
from negfast.train.verdict_task import VerdictBatch, VerdictTask


class GroupStep(NamedTuple):
    """A step's rollout, reward terms [B, G, n], loss, and the objective to ask again under a policy that moved on."""

    rollout: Rollout
    terms: Tensor
    result: GRPOTerms
    objective: TrieLoss | None


@dataclass(frozen=True)
class Groups:
    """A share's requests of a round, one group of answers each."""

    prompts: PromptBatch
    ids: Tensor  # int64 [B], which key the noise
    rewards: RewardTable


@dataclass(frozen=True)
class GrpoBatch:
    """What a share of a step reads; no groups where an earlier rollout serves again."""

    step: int
    share: Share
    groups: Groups | None
    items: ItemBatch | None
    verdicts: VerdictBatch | None
    tokens: int


class GrpoStage:
    """GRPO over the train requests with a non-empty future F.

    With ``epochs`` above 1 a rollout serves that many steps. Checkpoints then fall between rollouts, so that resuming
    stays exact.
    """

    name = "grpo"

    def __init__(self, engine: Engine) -> None:
        settings = self.config = engine.config.grpo
        self.engine = engine
        self.kept: dict[Share, tuple[PromptBatch, GroupStep]] = {}  # rollouts that later steps of their round reuse
        train = engine.train_requests
        if engine.config.reward.target == "next":
            train = only_next(engine.log, train)
        self.rows = np.flatnonzero(train.has_dislikes)  # a request's number in ``train`` keys its noise
        self.requests = train.take(self.rows)
        self.reference = freeze(engine.policy) if settings.beta else None
        self.objective = GRPOObjective(
            loss=settings.loss,
            scale_rewards=settings.scale_rewards,
            set_size=settings.set_size,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            beta=settings.beta,
            kl=settings.kl,
            temperature=settings.temperature,
        )
        self.neighbours = co_dislike_neighbours(engine.log, engine.fit_until)
        self.content = content_neighbours(engine.data.embedding, engine.config.reward.content_threshold)
        welcome, self.measured = np.ones(len(self.requests), dtype=bool), dict[str, float]()
        if settings.schedule == "progressive":
            of_bucket, self.measured = measure_views(engine, self.requests)
            welcome = of_bucket[history_bucket(engine, self.requests)]
        self.schedule = ViewSchedule(settings, welcome)
        self.next_items = NextItems(engine, engine.config.sft)
        self.verdict = VerdictTask(engine, engine.config.sft.verdicts)

    def read(self, step: int, share: Share = WHOLE) -> GrpoBatch:
        settings = self.config
        round_, again = divmod(step, settings.epochs)
        groups = None if again else self.read_groups(round_, share)
        items = self.next_items.read(step, share) if settings.sft_weight else None
        told = settings.verdict_weight > 0 and len(self.verdict.candidates) > 0
        verdicts = self.verdict.read(step, share) if told else None
        tokens = sum(part.tokens for part in (items, verdicts) if part is not None)
        if groups is not None:
            answers = len(groups.ids) * settings.group
            tokens += len(groups.prompts.tokens) + answers * (self.engine.trie.levels - 1)
        return GrpoBatch(step, share, groups, items, verdicts, tokens)

    def step(self, batch: GrpoBatch) -> StepResult:
        engine, settings = self.engine, self.config
        if batch.groups is None:
            prompts, taken = self.kept[batch.share]  # a stage starts and resumes between rounds
            updated = reuse_loss(engine.policy, prompts, taken)
            taken = taken._replace(result=updated)
        else:
            prompts, taken = batch.groups.prompts, self.sample(batch.step, batch.groups)
            if settings.epochs > 1:
                self.kept[batch.share] = (prompts, taken)
        sampled, terms, result, _ = taken
        part = len(terms) / min(settings.requests, len(self.requests))  # of the batch's groups
        loss, tokens = part * result.loss, len(prompts.tokens) + sum(len(rows) for rows in sampled.rows[1:])
        counted = sampled.tokens.counted
        if settings.objective == "full":
            counted = torch.ones_like(counted)  # forced tokens too

        def mean(values: Tensor) -> Mean:
            return Mean(part * sampled.mean(values), part)

        metrics: dict[str, Mean | float | None] = {
            "reward": mean(terms.sum(-1)),
            "kl": Mean(result.kl.sum(), counted.sum()),
            "entropy": Mean(result.entropy.sum(), counted.sum()),
            "clipped": Mean(result.clipped.sum(), counted.sum()),
            "hit_rate": mean(terms[..., HIT]),
            "collab_reward": mean(terms[..., COLLABORATIVE]),
            "like_penalty": mean(terms[..., LIKED]),
            "hitless_groups": Mean((terms[..., HIT].sum(-1) == 0).sum(), len(terms)),
            **gradient_shares(terms),
            "mixed_share": self.schedule.share(batch.step),
            "forced_tokens": Mean((~counted).sum(), counted.numel()),
        }
        if batch.items is not None:
            items, _ = self.next_items.loss(batch.items)
            loss, tokens = loss + settings.sft_weight * items, tokens + batch.items.tokens
            metrics["sft_loss"] = batch.share.part(items)
        if batch.verdicts is not None:
            verdict = self.verdict.loss(batch.verdicts)
            loss, tokens = loss + settings.verdict_weight * verdict, tokens + batch.verdicts.tokens
            metrics["verdict_bce"] = batch.share.part(verdict)
        return StepResult(loss, metrics, tokens)

    def outcome(self) -> dict[str, float]:
        return self.measured

    def read_groups(self, round_: int, share: Share) -> Groups:
        """The share's requests of the stage's round ``round_``."""
        engine, settings = self.engine, self.config
        seed, step = engine.config.train.seed, round_ * settings.epochs
        whole = epoch_rows(seed, "grpo", round_, len(self.requests), settings.requests)
        views = self.schedule.draw(step, whole, task_rng(seed, "views", step))
        mine = share.of(len(whole))
        picked = whole[mine]
        requests = self.requests.take(picked)
        batch = engine.prompts.build(requests.user, requests.day, views[mine], settings.group, tail="next-dislike")
        table = build_reward_table(
            requests, engine.log.n_items, engine.config.reward, self.neighbours, self.content, engine.device
        )
        ids = self.rows[whole] + repeated(whole) * len(engine.train_requests)
        return Groups(batch.with_prior(), put(ids[mine], engine.device), table)

    def sample(self, step: int, groups: Groups) -> GroupStep:
        """Rollouts of the groups at the round that begins with ``step``, with their on-policy loss."""
        engine, settings = self.engine, self.config
        rows = torch.arange(len(groups.ids), device=engine.device)[:, None]
        return group_loss(
            engine.policy,
            self.reference,
            engine.chooser,
            groups.prompts,
            groups.ids,
            lambda items: groups.rewards.look_up(rows, items),
            self.objective,
            settings.group,
            engine.config.train.seed,
            step,
            full=settings.objective == "full",
            sampling=settings.sampling,
            normalised=settings.normalised_weights,
        )


def check_combinations(config: Config) -> None:
    """InputError where settings of the stage contradict each other or those of others."""
    settings, prior_weight = config.grpo, config.prior.weight
    if (views := config.sft.negative_view + config.sft.positive_view) > 1:
        raise InputError(f"sft.negative_view + sft.positive_view: found {views:g}, expected at most 1")
    if config.train.checkpoint_every % settings.epochs:
        found = config.train.checkpoint_every
        raise InputError(f"train.checkpoint_every: found {found}, expected a multiple of grpo.epochs={settings.epochs}")
    shares = config.train.accumulate * distributed.planned_size()
    if settings.loss == "dapo" and shares > 1:
        raise InputError(
            f"grpo.loss: found dapo with {shares} shares of a batch (ranks x train.accumulate), expected dr_grpo or "
            "grpo: a share does not know how many tokens the others count"
        )
    if config.train.token_budget and not settings.can_be_split:
        raise InputError(
            f"train.token_budget: found {config.train.token_budget} with grpo.loss={settings.loss} and "
            f"grpo.epochs={settings.epochs}, expected 0: such a batch cannot be split"
        )
    if settings.objective == "full":
        if settings.beta and settings.kl != "k3":
            raise InputError(f"grpo.objective=full: found grpo.kl={settings.kl}, expected k3")
        if prior_weight:
            raise InputError(f"grpo.objective=full: found prior.weight={prior_weight:g}, expected 0")
        if settings.sampling != "with_replacement":
            raise InputError(f"grpo.objective=full: found grpo.sampling={settings.sampling}, expected with_replacement")
    if settings.epochs > 1:
        for key, wanted in (("objective", "trie"), ("sampling", "with_replacement")):
            if (given := getattr(settings, key)) != wanted:
                raise InputError(f"grpo.epochs={settings.epochs}: found grpo.{key}={given}, expected {wanted}")
    if settings.sampling == "without_replacement":
        for key, value in (("loss", "dr_grpo"), ("set_size", 0), ("scale_rewards", False)):
            if getattr(settings, key) != value:
                raise InputError(
                    f"grpo.sampling=without_replacement: found grpo.{key}={getattr(settings, key)}, expected {value}"
                )
    if settings.set_size and settings.scale_rewards:
        raise InputError(
            "grpo.scale_rewards: found true with grpo.set_size, expected false: max@k has its own baseline"
        )
    if settings.set_size > settings.group:
        raise InputError(f"grpo.set_size: found {settings.set_size}, expected at most grpo.group={settings.group}")


def group_loss(
    policy: Policy,
    reference: Policy | None,
    chooser: TrieChooser,
    batch: PromptBatch,
    request_ids: Tensor,
    reward: Callable[[Tensor], Tensor],
    objective: GRPOObjective,
    group: int,
    seed: int,
    step: int,
    full: bool = False,
    sampling: str = "with_replacement",
    normalised: bool = True,
) -> GroupStep:
    """One on-policy GRPO step up to its loss: rollout, reward, reference.

    ``reward`` gives the terms [B, G, n] of items [B, G]; their sum is what an answer earns. ``reference`` is needed
    where the objective has beta > 0. ``full`` trains log-probabilities over the whole vocabulary, as general libraries
    do, of answers that are sampled on the trie all the same; every token counts then, and the KL must be k3.
    ``sampling`` "without_replacement" draws distinct answers, see `negfast.train.grpo.sampling`, with ``normalised``
    weights or not. Raises ValueError on what cannot be combined.
    """
    if full and ((objective.kl != "k3" and objective.beta) or chooser.prior_weight):
        raise ValueError("the full objective needs kl k3 and prior weight 0: it knows neither nodes nor prior")
    if full and sampling != "with_replacement":
        raise ValueError("the full objective needs sampling with replacement: weights are those of the trie's policy")
    arguments = (policy, chooser, batch, request_ids, NEXT_DISLIKE, group, seed, step, objective.temperature)
    distinct = rollout_without_replacement(*arguments) if sampling == "without_replacement" else None
    sampled = rollout(*arguments, keep_forced=full) if distinct is None else distinct.rollout
    terms = reward(sampled.items)
    reference_logits = None
    if reference is not None:
        with span("reference"), torch.no_grad():
            if full:
                reference_logits = reference.full_logits(replay_hidden(reference, batch, sampled))
            else:
                reference_logits = replay_logits(reference, batch, sampled)
    with span("loss"):
        rewards, levels = terms.sum(-1), chooser.trie.levels
        if full:
            return GroupStep(sampled, terms, full_loss(policy, sampled, rewards, objective, reference_logits), None)
        compact = compact_rollout(chooser, batch.prior, NEXT_DISLIKE, sampled)
        if distinct is not None:
            result = distinct_loss(distinct, rewards, objective, levels, reference_logits, normalised, compact)
            return GroupStep(sampled, terms, result, None)
        loss = TrieLoss(sampled, compact, rewards, objective, levels, reference_logits)
        return GroupStep(sampled, terms, loss(sampled.choice.logits), loss)


def reuse_loss(policy: Policy, batch: PromptBatch, taken: GroupStep) -> GRPOTerms:
    """The loss of an earlier rollout under the policy as it is now, by a second pass, with ratios against then."""
    assert taken.objective is not None, "config refuses epochs > 1 with what has no second pass"
    return taken.objective(replay_logits(policy, batch, taken.rollout), taken.result.log_prob)


def repeated(rows: np.ndarray) -> np.ndarray:
    """Which rows int64 [B] stand earlier in the batch already, bool [B]: where an epoch ends and the next begins in it,
    a request may come twice, and its second group must not be the first one over again."""
    _, first, place = np.unique(rows, return_index=True, return_inverse=True)
    return np.arange(len(rows)) != first[place]


def gradient_shares(terms: Tensor) -> dict[str, Mean]:
    """How much each reward term makes of the absolute deviations of rewards from their group's mean, from terms
    [B, G, 3]."""
    spread = (terms - terms.mean(1, keepdim=True)).abs().sum((0, 1))
    names = {"share_hit": HIT, "share_collab": COLLABORATIVE, "share_liked": LIKED}
    return {name: Mean(spread[term], spread.sum()) for name, term in names.items()}


def freeze(policy: Policy) -> Policy:
    """A copy that takes no gradient. It shares the weights that do not train: beside adapters, all the base model's.
    Where layers are sharded it has its own parts of them."""
    if policy.bare_layers:
        return sharding.frozen_copy(policy)
    shared = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    reference = copy.deepcopy(policy, shared).eval()
    return reference.requires_grad_(False)
