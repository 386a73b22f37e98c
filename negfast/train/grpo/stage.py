"""Stage 3, progressive GRPO on the trie: sample a group of items for each request, reward them, one update.

The groups of a history share one pass through it. The reference policy is the frozen policy that the stage starts from;
the loss of SFT may stay beside (`grpo.sft_weight`).
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from negfast.model.histories import Histories
from negfast.model.policy import Policy
from negfast.runtime import sharding
from negfast.runtime.engine import Engine
from negfast.staging import put
from negfast.train.grpo.loss import GroupLoss, GroupStep, objective_of
from negfast.train.grpo.reward import HIT, TERMS, RewardTable, build_reward_table, reward_sources
from negfast.train.grpo.schedule import ViewSchedule, history_bucket, measure_views
from negfast.train.histories import HistoryTask
from negfast.train.order import task_rng
from negfast.train.sft import ItemBatch, NextItems
from negfast.train.step import WHOLE, Mean, MicroBatch, StepResult


@dataclass(frozen=True)
class Groups:
    """A micro-batch's requests of a round, one group of completions each."""

    ids: Tensor  # int64 [R], which key the noise
    rewards: RewardTable


@dataclass(frozen=True)
class GrpoBatch:
    """What a micro-batch of a step reads; no groups where an earlier rollout serves again."""

    step: int
    micro_batch: MicroBatch
    histories: Histories
    requests: int  # of the whole batch
    groups: Groups | None
    items: ItemBatch | None
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
        self.kept: dict[MicroBatch, GroupStep] = {}  # rollouts that later steps of their round reuse
        train = engine.train_requests
        self.rows = np.flatnonzero(train.has_dislikes)  # a request's number in ``train`` keys its noise
        self.requests = replace(train.only(self.rows), next_only=engine.config.reward.target == "next")
        self.loss = GroupLoss(
            engine.policy,
            freeze(engine.policy) if settings.beta else None,
            engine.chooser,
            objective_of(settings),
            settings.group,
            engine.config.train.seed,
            full=settings.objective == "full",
            static=engine.device.type == "cuda",
        )
        self.sources = reward_sources(engine, engine.fit_until)
        allow_mixed, self.measured = np.ones(len(self.requests), dtype=bool), dict[str, float]()
        if settings.schedule == "progressive":
            of_bucket, self.measured = measure_views(engine, self.requests)
            allow_mixed = of_bucket[history_bucket(engine, self.requests)]
        self.schedule = ViewSchedule(settings, allow_mixed)
        self.next_items = NextItems(engine, engine.config.sft, self.requests)
        self.task = HistoryTask(engine, "grpo", self.requests)

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> GrpoBatch:
        """The steps of a round read the same histories."""
        engine, settings = self.engine, self.config
        round_, again = divmod(step, settings.epochs)
        drawn = self.task.draw(round_, settings.histories, settings.requests_per_history)
        latest = drawn.requests[np.searchsorted(drawn.owner, np.arange(len(drawn.histories)), "right") - 1]
        views = self.schedule.draw(
            round_ * settings.epochs, latest, task_rng(engine.config.train.seed, "views", round_)
        )
        histories = self.task.read(drawn, micro_batch, views)
        groups = None
        if not again:
            mine = drawn.part(micro_batch)
            table = build_reward_table(self.requests.take(drawn.requests[mine]), self.sources, engine.device)
            ids = self.rows[drawn.requests] + repeated(drawn.requests) * len(engine.train_requests)
            groups = Groups(put(ids[mine], engine.device), table)
        items = self.next_items.read(histories, drawn, step, micro_batch) if settings.sft_weight else None
        tokens = len(histories.tokens) + (0 if items is None else items.tokens)
        if groups is not None:
            tokens += len(groups.ids) * settings.group * (engine.trie.levels - 1)
        return GrpoBatch(step, micro_batch, histories, len(drawn.requests), groups, items, tokens)

    def step(self, batch: GrpoBatch) -> StepResult:
        settings, histories = self.config, batch.histories
        if batch.groups is None:
            taken = self.kept[batch.micro_batch]  # a stage starts and resumes between rounds
            taken = taken._replace(terms=self.loss.reuse(histories, taken))
        else:
            taken = self.sample(batch.step, histories, batch.groups)
            if settings.epochs > 1:
                self.kept[batch.micro_batch] = taken
        sampled, reward, terms, _ = taken
        part = len(reward) / batch.requests
        loss, tokens = part * terms.loss, len(histories.tokens) + sum(len(rows) for rows in sampled.rows[1:])
        counted = torch.ones_like(sampled.tokens.counted) if self.loss.full else sampled.tokens.counted

        def mean(values: Tensor) -> Mean:
            return Mean(part * values.mean(), part)

        metrics: dict[str, Mean | float | None] = {
            "reward": mean(reward.sum(-1)),
            "kl": Mean(terms.kl.sum(), counted.sum()),
            "entropy": Mean(terms.entropy.sum(), counted.sum()),
            "clipped": Mean(terms.clipped.sum(), counted.sum()),
            **{f"reward_{term.name}": mean(reward[..., place]) for place, term in enumerate(TERMS)},
            "hitless_groups": Mean((reward[..., HIT].sum(-1) == 0).sum(), len(reward)),
            **gradient_shares(reward),
            "mixed_share": self.schedule.share(batch.step),
            "forced_tokens": Mean((~counted).sum(), counted.numel()),
        }
        if batch.items is not None:
            items, _ = self.next_items.loss(batch.items)
            loss, tokens = loss + settings.sft_weight * items, tokens + batch.items.tokens
            metrics["sft_loss"] = batch.micro_batch.part(items)
        return StepResult(loss, metrics, tokens)

    def outcome(self) -> dict[str, float]:
        return self.measured

    def sample(self, step: int, histories: Histories, groups: Groups) -> GroupStep:
        """Rollouts of the groups at the round that begins with ``step``, with their on-policy loss."""
        rows = torch.arange(len(groups.ids), device=self.engine.device)[:, None]
        return self.loss.sample(histories, groups.ids, lambda items: groups.rewards.look_up(rows, items), step)


def repeated(rows: np.ndarray) -> np.ndarray:
    """Which rows int64 [B] stand earlier in the batch already, bool [B]: where an epoch ends and the next begins in it,
    a request may come twice, and its second group must not be the first one over again."""
    _, first, place = np.unique(rows, return_index=True, return_inverse=True)
    return np.arange(len(rows)) != first[place]


def gradient_shares(reward: Tensor) -> dict[str, Mean]:
    """How much each reward term makes of the absolute deviations of rewards from their group's mean, from terms
    [B, G, terms]."""
    spread = (reward - reward.mean(1, keepdim=True)).abs().sum((0, 1))
    return {f"share_{term.name}": Mean(spread[place], spread.sum()) for place, term in enumerate(TERMS)}


def freeze(policy: Policy) -> Policy:
    """A copy that takes no gradient. It shares the weights that do not train: beside adapters, all the base model's.
    Where layers are sharded it has its own parts of them. Matrices that would be cast to bfloat16 at every call are
    kept in it."""
    if policy.bare_layers:
        return sharding.frozen_copy(policy)
    shared = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    reference = copy.deepcopy(policy, shared | {id(policy.copies): ()}).eval()
    if policy.in_bfloat16:
        for module in reference.decoder.modules():
            if isinstance(module, nn.Linear) and id(module.weight) not in shared:
                module.to(torch.bfloat16)
    return reference.requires_grad_(False)
