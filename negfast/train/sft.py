"""Stage 2, SFT: every active user-day -> the items of F after <|next-dislike|>, of P after <|next-like|>."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from negfast.config import Sft
from negfast.data.split import Requests, UserDays
from negfast.model.histories import MIXED, NEGATIVE_ONLY, POSITIVE_ONLY, Histories
from negfast.runtime.engine import Engine
from negfast.runtime.likelihood import Targets, target_log_probs
from negfast.sid.prior import MARKERS, NEXT_DISLIKE, NEXT_LIKE
from negfast.staging import put
from negfast.train.histories import Drawn, HistoryTask
from negfast.train.order import task_rng
from negfast.train.step import WHOLE, Mean, MicroBatch, StepResult

SCALES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of code logits, tried on valid; the smallest still leaves GRPO a gradient


@dataclass(frozen=True)
class ItemBatch:
    """Target items of a micro-batch's requests; A targets, sorted by request."""

    targets: Targets
    branches: Tensor  # int64 [A], NEXT_DISLIKE or NEXT_LIKE
    weights: Tensor  # float32 [A]
    requests: int  # of the whole batch
    tokens: int


def days_with_future(engine: Engine, target: str) -> UserDays:
    """The train requests with anything to come; ``target`` "next" cuts F down to the item disliked first."""
    days = engine.train_requests
    return replace(days.only(days.ahead > 0), next_only=target == "next")


class NextItems:
    """The next-item task: both branches of requests."""

    def __init__(self, engine: Engine, settings: Sft, requests: UserDays | Requests) -> None:
        self.engine, self.settings, self.requests = engine, settings, requests

    def read(self, histories: Histories, drawn: Drawn, step: int, micro_batch: MicroBatch) -> ItemBatch:
        """Items drawn of the futures of the micro-batch's requests, which are those of ``histories``."""
        rng = task_rng(self.engine.config.train.seed, "targets", step)
        settings = self.settings
        columns = draw_targets(self.requests.take(drawn.requests), settings.targets, settings.like_weight, rng)
        mine = drawn.part(micro_batch)
        here = (columns[0] >= mine.start) & (columns[0] < mine.stop)
        request, item, branch, weight = (column[here] for column in columns)
        vocabulary = self.engine.policy.vocabulary
        marker_ids = np.array([vocabulary.marker(name) for name in MARKERS])
        markers, items, branches, weights = (
            put(column, self.engine.device) for column in (marker_ids[branch], item, branch, weight)
        )
        targets = Targets(histories, request - mine.start, markers, items)
        return ItemBatch(targets, branches, weights, len(drawn.requests), len(item) * self.engine.trie.levels)

    def loss(self, batch: ItemBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(the micro-batch's part of the loss, metrics). An item of F weighs 1/|F drawn|, of P like_weight/|P drawn|;
        the mean is over requests."""
        weights = batch.weights
        log_p = target_log_probs(self.engine, batch.targets, batch.targets.histories.prior, batch.branches)
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
    """A view for each of ``size`` histories, uint8: negative-only, positive-only, else mixed."""
    draw = rng.random(size)
    views = np.where(draw < negative, NEGATIVE_ONLY, np.where(draw < negative + positive, POSITIVE_ONLY, MIXED))
    return views.astype(np.uint8)


@dataclass(frozen=True)
class SftBatch:
    """What a micro-batch of a step reads."""

    micro_batch: MicroBatch
    histories: Histories
    items: ItemBatch

    @property
    def tokens(self) -> int:
        return len(self.histories.tokens) + self.items.tokens


class SftStage:
    """Next items."""

    name = "sft"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.config = engine.config.sft
        if self.config.reset_head:
            torch.nn.init.zeros_(engine.policy.block.head.weight)
        days = days_with_future(engine, self.config.target)
        self.next_items = NextItems(engine, self.config, days)
        self.task = HistoryTask(engine, "sft", days)

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> SftBatch:
        settings = self.config
        drawn = self.task.draw(step, settings.histories, settings.requests_per_history)
        rng = task_rng(self.engine.config.train.seed, "views", step)
        views = draw_views(len(drawn.histories), settings.negative_view, settings.positive_view, rng)
        histories = self.task.read(drawn, micro_batch, views)
        return SftBatch(micro_batch, histories, self.next_items.read(histories, drawn, step, micro_batch))

    def step(self, batch: SftBatch) -> StepResult:
        self.engine.policy.block.scale.fill_(1.0)  # validation may have left another
        loss, metrics = self.next_items.loss(batch.items)
        return StepResult(loss, {**metrics}, batch.tokens)

    def outcome(self) -> dict[str, float]:
        return {}
