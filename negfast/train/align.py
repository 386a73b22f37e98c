"""Stage 1, align: the item level. Title -> SID, SID -> a co-disliked item, and verdicts.

Pairs come from events before an earlier cut (`align.cut` of the train days), so that they do not memorise the futures
of later train requests.
"""

import numpy as np
import torch
from torch import Tensor

from negfast.data.log import DISLIKE, EventLog
from negfast.model.layout import GroupLayout
from negfast.train.answers import answer_log_probs
from negfast.train.engine import Engine, epoch_rows, task_rng
from negfast.train.step import WHOLE, Mean, Share, StepResult
from negfast.train.verdict import VerdictTask

TITLE_TOKENS = 48  # of a title are read


class TitleToSid:
    """``<|text|> title tokens`` -> ``<|item|> sid``, over the trie without prior."""

    def __init__(self, engine: Engine, batch: int) -> None:
        texts = engine.data.items.text
        self.items = np.array([i for i, text in enumerate(texts) if text.strip()], dtype=np.int64)
        self.engine, self.batch = engine, batch
        encoded = engine.tokenizer([texts[i] for i in self.items])["input_ids"] if len(self.items) else []
        marker = engine.policy.vocabulary.marker("text")
        self.prompts = [np.array([marker, *ids[:TITLE_TOKENS]], dtype=np.int64) for ids in encoded]

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, int]:
        """(the share's part of the mean negative log-likelihood of an item, tokens)."""
        engine = self.engine
        whole = epoch_rows(engine.config.train.seed, "titles", step, len(self.items), self.batch)
        rows = whole[share.of(len(whole))]
        prompts = [self.prompts[row] for row in rows]
        return _item_loss(engine, prompts, "item", self.items[rows], len(whole), has_text=True)


class CoDisliked:
    """``<|item|> sid`` -> ``<|next-dislike|> sid`` of an item that the same user disliked too."""

    def __init__(self, engine: Engine, batch: int, before_day: int) -> None:
        self.engine, self.batch = engine, batch
        self.log_offsets, self.items = disliked_items(engine.log, before_day)
        counts = np.diff(self.log_offsets)
        self.users = np.flatnonzero(counts >= 2)
        # a user with n dislikes has n (n - 1) pairs; the square root keeps the prolific from drowning the rest
        self.share = np.sqrt(counts[self.users] * (counts[self.users] - 1.0))
        self.share /= max(self.share.sum(), 1.0)

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, int]:
        """(the share's part of the mean negative log-likelihood of the second item of a pair, tokens)."""
        engine = self.engine
        rng = task_rng(engine.config.train.seed, "pairs", step)
        users = rng.choice(self.users, self.batch, p=self.share)
        counts = np.diff(self.log_offsets)[users]
        first = rng.integers(0, counts)
        second = (first + rng.integers(1, counts)) % counts
        start, mine = self.log_offsets[users], share.of(self.batch)
        marker = engine.policy.vocabulary.marker("item")
        sids = engine.prompts.item_tokens[self.items[start + first][mine]].astype(np.int64)
        prompts = [np.concatenate([[marker], sid]) for sid in sids]
        targets = self.items[start + second][mine]
        return _item_loss(engine, prompts, "next-dislike", targets, self.batch, has_text=False)


def disliked_items(log: EventLog, before_day: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct items that each user disliked before a day, int64 [U + 1] offsets and items."""
    rows = (log.feedback == DISLIKE) & (log.day < before_day)
    pairs = np.unique(log.user[rows].astype(np.int64) * log.n_items + log.item[rows])
    counts = np.bincount(pairs // log.n_items, minlength=log.n_users)
    return np.concatenate([[0], np.cumsum(counts)]), pairs % log.n_items


def _item_loss(
    engine: Engine, prompts: list[np.ndarray], marker: str, items: np.ndarray, whole: int, has_text: bool
) -> tuple[Tensor, int]:
    """(summed negative log-likelihood over the ``whole`` batch's number of items, tokens)."""
    cu_seqlens = np.concatenate([[0], np.cumsum([len(p) for p in prompts])])
    layout = GroupLayout.build(cu_seqlens, 1, engine.device)
    tokens = torch.from_numpy(np.concatenate(prompts)).to(engine.device)
    targets = torch.from_numpy(items).to(engine.device)
    markers = torch.full_like(targets, engine.policy.vocabulary.marker(marker))
    log_p = answer_log_probs(engine, layout, tokens, markers, targets, None, 0, has_text)
    return -log_p.sum() / whole, len(tokens) + len(items) * engine.trie.levels


class AlignStage:
    """The item-level tasks, a batch of each a step; a task without data (no titles, no pairs) is left out."""

    name = "align"

    def __init__(self, engine: Engine) -> None:
        settings = self.config = engine.config.align
        first_day = int(engine.log.day.min())
        before_day = first_day + round((engine.data.valid_day - first_day) * settings.cut)
        titles, pairs = TitleToSid(engine, settings.titles), CoDisliked(engine, settings.pairs, before_day)
        self.tasks: dict[str, TitleToSid | CoDisliked | VerdictTask] = {}
        if settings.titles and len(titles.items):
            self.tasks["title_nll"] = titles
        if settings.pairs and len(pairs.users):
            self.tasks["pair_nll"] = pairs
        self.tasks["verdict_bce"] = VerdictTask(engine, settings.verdicts)

    def step(self, step: int, share: Share = WHOLE) -> StepResult:
        losses = {name: task.loss(step, share) for name, task in self.tasks.items()}
        total = torch.stack([loss for loss, _ in losses.values()]).sum()
        metrics: dict[str, Mean | float | None] = {name: share.part(loss) for name, (loss, _) in losses.items()}
        return StepResult(total, metrics, sum(tokens for _, tokens in losses.values()))
