"""Stage 2, SFT: every active user-day -> the items of F after <|next-dislike|>, of P after <|next-like|>; verdicts."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negfast.config import Sft
from negfast.data.split import Requests, only_next
from negfast.model.prompts import MIXED, NEGATIVE_ONLY, POSITIVE_ONLY, PromptBatch
from negfast.runtime.engine import Engine
from negfast.runtime.likelihood import target_log_probs
from negfast.sid.prior import NEXT_DISLIKE, NEXT_LIKE
from negfast.staging import put
from negfast.train.order import epoch_rows, task_rng
from negfast.train.step import WHOLE, Mean, MicroBatch, StepResult
from negfast.train.verdict_task import VerdictBatch, VerdictTask

SCALES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of code logits, tried on valid; the smallest still leaves GRPO a gradient


@dataclass(frozen=True)
class ItemBatch:
    """A micro-batch's prompts and their target items; A targets, sorted by prompt."""

    prompts: PromptBatch
    markers: Tensor  # int64 [A], before a target
    items: Tensor  # int64 [A]
    branches: Tensor  # int64 [A]
    weights: Tensor  # float32 [A]
    requests: int  # of the whole batch
    tokens: int


class NextItems:
    """The next-item task: both branches of a request share its prompt in one group."""

    def __init__(self, engine: Engine, settings: Sft) -> None:
        requests = engine.train_requests
        if settings.target == "next":
            requests = only_next(engine.log, requests)
        has_future = (np.diff(requests.dislike_offsets) > 0) | (np.diff(requests.like_offsets) > 0)
        self.engine, self.settings = engine, settings
        self.requests = requests.take(has_future)

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> ItemBatch:
        """The micro-batch's requests and the items drawn of their futures."""
        engine, settings = self.engine, self.settings
        seed, size = engine.config.train.seed, len(self.requests)
        rows = epoch_rows(seed, "next-items", step, size, settings.requests)
        rng = task_rng(seed, "targets", step)
        requests = self.requests.take(rows)
        request, item, branch, weight = draw_targets(requests, settings.targets, settings.like_weight, rng)
        views = draw_views(len(rows), settings.negative_view, settings.positive_view, rng)

        mine = micro_batch.of(len(rows))
        drawn = (request >= mine.start) & (request < mine.stop)
        request, item, branch, weight = (column[drawn] for column in (request - mine.start, item, branch, weight))
        counts = np.bincount(request, minlength=mine.stop - mine.start)
        batch = engine.prompts.build(requests.user[mine], requests.day[mine], views[mine], counts)
        names = {NEXT_DISLIKE: "next-dislike", NEXT_LIKE: "next-like"}
        marker_ids = np.array([engine.policy.vocabulary.marker(names[b]) for b in (NEXT_DISLIKE, NEXT_LIKE)])

        markers, items, branches, weights = (
            put(column, engine.device) for column in (marker_ids[branch], item, branch, weight)
        )
        tokens = len(batch.tokens) + len(item) * engine.trie.levels
        return ItemBatch(batch.with_prior(), markers, items, branches, weights, len(rows), tokens)

    def loss(self, batch: ItemBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(the micro-batch's part of the loss, metrics). An item of F weighs 1/|F drawn|, of P like_weight/|P drawn|;
        the mean is over requests."""
        prompts, weights = batch.prompts, batch.weights
        log_p = target_log_probs(
            self.engine, prompts.layout, prompts.tokens, batch.markers, batch.items, prompts.prior, batch.branches
        )
        loss = -(weights * log_p).sum() / batch.requests
        disliked = batch.branches == NEXT_DISLIKE
        metrics = {"nll_dislike": Mean(-(log_p.detach() * weights * disliked).sum(), (weights * disliked).sum())}
        return loss, metrics


def draw_targets(
    requests: Requests, most: int, like_weight: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most ``most`` items of F and of P for each request: (request, item, branch int64 [A], weight float32 [A]),
    sorted by request."""
    parts = []
    for branch, offsets, items, share in (
        (NEXT_DISLIKE, requests.dislike_offsets, requests.dislikes, 1.0),
        (NEXT_LIKE, requests.like_offsets, requests.likes, like_weight),
    ):
        owner = np.repeat(np.arange(len(requests)), np.diff(offsets))
        shuffled = np.lexsort((rng.random(len(items)), owner))  # random order within a request
        place = np.arange(len(items)) - offsets[owner]
        chosen = shuffled[place < most]
        owner = owner[chosen]
        weight = share / np.bincount(owner, minlength=len(requests))[owner]
        parts.append((owner, items[chosen].astype(np.int64), np.full(len(chosen), branch), weight))
    request, item, branches, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(request, kind="stable")
    return request[order], item[order], branches[order].astype(np.int64), weight[order].astype(np.float32)


def draw_views(size: int, negative: float, positive: float, rng: np.random.Generator) -> np.ndarray:
    """A view for each of ``size`` prompts, uint8: negative-only, positive-only, else mixed."""
    draw = rng.random(size)
    views = np.where(draw < negative, NEGATIVE_ONLY, np.where(draw < negative + positive, POSITIVE_ONLY, MIXED))
    return views.astype(np.uint8)


@dataclass(frozen=True)
class SftBatch:
    """What a micro-batch of a step reads."""

    micro_batch: MicroBatch
    items: ItemBatch
    verdicts: VerdictBatch | None

    @property
    def tokens(self) -> int:
        return self.items.tokens + (0 if self.verdicts is None else self.verdicts.tokens)


class SftStage:
    """Next items and verdicts."""

    name = "sft"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.config = engine.config.sft
        if self.config.reset_head:
            torch.nn.init.zeros_(engine.policy.block.head.weight)
        self.next_items = NextItems(engine, self.config)
        self.verdict = VerdictTask(engine, self.config.verdicts)

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> SftBatch:
        verdicts = (
            self.verdict.read(step, micro_batch)
            if self.config.verdict_weight and len(self.verdict.candidates)
            else None
        )
        return SftBatch(micro_batch, self.next_items.read(step, micro_batch), verdicts)

    def step(self, batch: SftBatch) -> StepResult:
        self.engine.policy.block.scale.fill_(1.0)  # validation may have left another
        loss, metrics = self.next_items.loss(batch.items)
        if batch.verdicts is not None:
            verdict = self.verdict.loss(batch.verdicts)
            loss = loss + self.config.verdict_weight * verdict
            metrics["verdict_bce"] = batch.micro_batch.part(verdict)
        return StepResult(loss, {**metrics}, batch.tokens)

    def outcome(self) -> dict[str, float]:
        return {}
