"""Stage 2, SFT: every active user-day -> the items of F after <|next-dislike|>, of P after <|next-like|>; verdicts."""

import numpy as np
import torch
from torch import Tensor

from negfast import spans
from negfast.config import Sft
from negfast.data.split import Requests, cut_futures, days_ahead, only_next
from negfast.model.prompts import MIXED, NEGATIVE_ONLY, POSITIVE_ONLY
from negfast.sid.prior import NEXT_DISLIKE, NEXT_LIKE
from negfast.train.answers import answer_log_probs
from negfast.train.engine import Engine, epoch_rows, task_rng
from negfast.train.step import WHOLE, Mean, Share, StepResult
from negfast.train.verdict import VerdictTask

SCALES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of code logits, tried on valid; the smallest still leaves GRPO a gradient


class NextItems:
    """The next-item task: both branches of a request share its prompt in one group."""

    def __init__(self, engine: Engine, settings: Sft) -> None:
        requests = engine.train_requests
        if settings.target == "next":
            requests = only_next(engine.log, requests)
        has_future = (np.diff(requests.dislike_offsets) > 0) | (np.diff(requests.like_offsets) > 0)
        self.engine, self.settings = engine, settings
        self.requests = requests.take(has_future)
        self.ahead = days_ahead(engine.log, self.requests) if settings.varied_horizon else None

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, dict[str, Mean], int]:
        """(the share's part of the loss, metrics, tokens). An item of F weighs 1/|F drawn|, of P like_weight/|P drawn|;
        mean over requests."""
        engine, settings = self.engine, self.settings
        seed, size = engine.config.train.seed, len(self.requests)
        rows = epoch_rows(seed, "next-items", step, size, settings.requests)
        rng = task_rng(seed, "targets", step)
        requests = self.requests.take(rows)
        if self.ahead is not None:
            horizons = rng.integers(1, engine.split.horizon + 1, len(rows))
            requests = cut_futures(requests, self.ahead.take(rows), horizons)
        request, item, branch, weight = draw_targets(requests, settings.targets, settings.like_weight, rng)
        views = draw_views(len(rows), settings.negative_view, settings.positive_view, rng)
        drop = (settings.context_dropout, rng.integers(2**32, size=len(rows))) if settings.context_dropout else None

        mine = share.of(len(rows))
        drawn = (request >= mine.start) & (request < mine.stop)
        request, item, branch, weight = (column[drawn] for column in (request - mine.start, item, branch, weight))
        counts = np.bincount(request, minlength=mine.stop - mine.start)
        batch = engine.prompts.build(
            requests.user[mine],
            requests.day[mine],
            views[mine],
            counts,
            dropout=None if drop is None else (drop[0], drop[1][mine]),
        )
        names = {NEXT_DISLIKE: "next-dislike", NEXT_LIKE: "next-like"}
        marker_ids = np.array([engine.policy.vocabulary.marker(names[b]) for b in (NEXT_DISLIKE, NEXT_LIKE)])

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(engine.device)

        branches = put(branch)
        log_p = answer_log_probs(
            engine, batch.layout, batch.tokens, put(marker_ids[branch]), put(item), batch.prior, branches
        )
        weights = put(weight)
        loss = -(weights * log_p).sum() / len(rows)
        disliked = branches == NEXT_DISLIKE
        metrics = {"nll_dislike": Mean(-(log_p.detach() * weights * disliked).sum(), (weights * disliked).sum())}
        return loss, metrics, len(batch.tokens) + len(item) * engine.trie.levels


@spans.data()
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

    def step(self, step: int, share: Share = WHOLE) -> StepResult:
        self.engine.policy.block.scale.fill_(1.0)  # validation may have left another
        items, metrics, item_tokens = self.next_items.loss(step, share)
        verdict, verdict_tokens = self.verdict.loss(step, share)
        loss = items + self.config.verdict_weight * verdict
        return StepResult(loss, {**metrics, "verdict_bce": share.part(verdict)}, item_tokens + verdict_tokens)

    def outcome(self) -> dict[str, float]:
        return {}
