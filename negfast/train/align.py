"""Stage 1, align: what semantic IDs mean, item by item.

Title -> SID, SID -> title, SID -> attributes, and SID -> a co-disliked item. Pairs come from events before an
earlier cut (`PAIR_DAYS` of the train days), so that they do not memorise the futures of later train requests.

What the stage has learned is measured on a seeded share of the items (`align.held_out`): no task on text is trained on
them, and no pair on the same share of the users.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from negfast.data.log import DAY, DISLIKE, EventLog
from negfast.errors import InputError
from negfast.model.beam import beam_search
from negfast.model.histories import Histories
from negfast.runtime.engine import Engine
from negfast.runtime.likelihood import Targets, code_ranks, target_log_probs
from negfast.sid.prior import NEXT_DISLIKE
from negfast.staging import put
from negfast.train.order import epoch_rows, task_rng
from negfast.train.step import WHOLE, Mean, MicroBatch, StepResult
from negfast.train.text import EXAMPLES_AT_ONCE, SidToText, attribute_examples, encode, title_examples

B = TypeVar("B")  # of what a task reads

PAIR_DAYS = 0.5  # share of the train days that pairs come from
PAIRS_MEASURED = 300
CLOSE = 10  # of the first level's codes that a held-out title's own should be among
TOP = 20  # of the generated items that a held-out pair's second item should be among


class Task(Protocol[B]):
    """A task of the stage."""

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> B: ...

    def loss(self, batch: B) -> Tensor: ...

    def accuracy(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class SidBatch:
    """Prompts, and the item that each should lead to."""

    targets: Targets
    whole: int  # items of the whole batch, of which these may be a micro-batch
    tokens: int


class TitleToSid:
    """``<|text|> title tokens`` -> ``<|item|> sid``, over the trie without prior."""

    def __init__(self, engine: Engine, batch: int, held_out: np.ndarray) -> None:
        texts = engine.data.items.text
        titled = np.array([bool(text.strip()) for text in texts], dtype=bool)
        self.engine, self.batch = engine, batch
        self.items, self.held = np.flatnonzero(titled & ~held_out), np.flatnonzero(titled & held_out)
        marker = engine.policy.vocabulary.marker("text")
        named = np.flatnonzero(titled)
        encoded = encode(engine, [texts[i].strip() for i in named])
        self.prompts = {int(i): np.array([marker, *ids], dtype=np.int64) for i, ids in zip(named, encoded, strict=True)}

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> SidBatch:
        """The micro-batch's titles of a step."""
        engine = self.engine
        whole = epoch_rows(engine.config.train.seed, "titles", step, len(self.items), self.batch)
        return self.of(self.items[whole[micro_batch.of(len(whole))]], len(whole))

    def of(self, items: np.ndarray, whole: int) -> SidBatch:
        """The titles of ``items``, int64 [B]."""
        return sid_batch(self.engine, [self.prompts[item] for item in items.tolist()], "item", items, whole, True)

    def loss(self, batch: SidBatch) -> Tensor:
        """The micro-batch's part of the mean negative log-likelihood of an item."""
        return sid_nll(self.engine, batch)

    def accuracy(self) -> dict[str, float]:
        """Of the held-out titles: the share whose code the model puts first at each level after the true codes above
        it, or among the first `CLOSE` at the first level, and the share whose item a greedy descent finds; every item
        of the trie competes. Beside them the first level's share for the commonest code of the trained items
        (``level1_chance``), and the same shares of as many titles that the stage saw first (``train_``)."""
        if not len(self.held):
            return {}
        seen = epoch_rows(self.engine.config.train.seed, "titles", 0, len(self.items), len(self.held))
        held, trained = self.ranks(self.held), self.ranks(self.items[seen])
        first = self.engine.data.codes[:, 0]
        commonest = np.bincount(first[self.items]).argmax()
        return {
            **{f"level{level + 1}": float((held[:, level] == 0).mean()) for level in range(held.shape[1])},
            f"level1_top{CLOSE}": float((held[:, 0] < CLOSE).mean()),
            "level1_chance": float((first[self.held] == commonest).mean()),
            "item": float((held == 0).all(1).mean()),
            "train_level1": float((trained[:, 0] == 0).mean()),
            "train_item": float((trained == 0).all(1).mean()),
        }

    @torch.no_grad()
    def ranks(self, items: np.ndarray) -> np.ndarray:
        """`code_ranks` int64 [N, L] of ``items`` after their titles."""
        parts = []
        for start in range(0, len(items), EXAMPLES_AT_ONCE):
            part = items[start : start + EXAMPLES_AT_ONCE]
            batch = self.of(part, len(part))
            parts.append(code_ranks(self.engine, batch.targets).cpu().numpy())
        return np.concatenate(parts)


class CoDisliked:
    """``<|item|> sid`` -> ``<|next-dislike|> sid`` of an item that the same user disliked too."""

    def __init__(self, engine: Engine, batch: int, before_day: int, held_out: float) -> None:
        """``held_out``: share of the users whose pairs are only measured."""
        self.engine, self.batch = engine, batch
        self.log_offsets, self.items = disliked_items(engine.log, before_day)
        users = np.flatnonzero(np.diff(self.log_offsets) >= 2)
        aside = task_rng(engine.config.train.seed, "held-out pairs", 0).random(len(users)) < held_out
        self.users, self.held = users[~aside], users[aside]

    def draw(self, users: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """``count`` pairs of different items that one of ``users`` disliked, each int64 [count]."""
        counts = np.diff(self.log_offsets)
        # a user with n dislikes has n (n - 1) pairs; the square root keeps the prolific from drowning the rest
        weight = np.sqrt(counts[users] * (counts[users] - 1.0))
        chosen = rng.choice(users, count, p=weight / weight.sum())
        first = rng.integers(0, counts[chosen])
        second = (first + rng.integers(1, counts[chosen])) % counts[chosen]
        start = self.log_offsets[chosen]
        return self.items[start + first], self.items[start + second]

    def prompts(self, items: np.ndarray) -> list[np.ndarray]:
        marker = self.engine.policy.vocabulary.marker("item")
        return [np.concatenate([[marker], sid]) for sid in self.engine.histories.item_tokens[items].astype(np.int64)]

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> SidBatch:
        """The micro-batch's pairs of a step."""
        engine, mine = self.engine, micro_batch.of(self.batch)
        first, second = self.draw(self.users, self.batch, task_rng(engine.config.train.seed, "pairs", step))
        return sid_batch(engine, self.prompts(first[mine]), "next-dislike", second[mine], self.batch, False)

    def loss(self, batch: SidBatch) -> Tensor:
        """The micro-batch's part of the mean negative log-likelihood of the second item of a pair."""
        return sid_nll(self.engine, batch)

    @torch.no_grad()
    def accuracy(self) -> dict[str, float]:
        """The share of pairs of the held-out users whose second item is among the ``TOP`` that the first one brings."""
        if not len(self.held):
            return {}
        engine, hits = self.engine, []
        rng = task_rng(engine.config.train.seed, "measured pairs", 0)
        first, second = self.draw(self.held, PAIRS_MEASURED, rng)
        asked, which = np.unique(first, return_inverse=True)
        width = max(engine.config.eval.beam, TOP + 1)
        for start in range(0, len(asked), EXAMPLES_AT_ONCE // 4):
            prompts = self.prompts(asked[start : start + EXAMPLES_AT_ONCE // 4])
            histories = Histories.of_prompts(prompts, engine.policy.vocabulary.marker("gap-0"), engine.device, False)
            found, _ = beam_search(engine.policy, engine.chooser, histories, None, NEXT_DISLIKE, width, TOP + 1)
            hits.append(found.cpu().numpy())
        brought = np.concatenate(hits)
        brought[brought == asked[:, None]] = -1  # a pair is of different items
        among = (brought[which] == second[:, None]) & (np.cumsum(brought[which] >= 0, axis=1) <= TOP)
        return {f"hit@{TOP}": float(among.any(1).mean())}


def held_out_items(engine: Engine) -> np.ndarray:
    """Which items the stage only measures on, bool [I]."""
    return task_rng(engine.config.train.seed, "held-out items", 0).random(engine.log.n_items) < (
        engine.config.align.held_out
    )


def disliked_items(log: EventLog, before_day: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct items that each user disliked before a day, int64 [U + 1] offsets and items."""
    rows = (log.feedback == DISLIKE) & log.before(before_day)
    pairs = np.unique(log.user[rows].astype(np.int64) * log.n_items + log.item[rows])
    counts = np.bincount(pairs // log.n_items, minlength=log.n_users)
    return np.concatenate([[0], np.cumsum(counts)]), pairs % log.n_items


def sid_batch(
    engine: Engine, prompts: list[np.ndarray], marker: str, items: np.ndarray, whole: int, has_text: bool
) -> SidBatch:
    """``prompts`` int64 each, with the targets ``items`` int64 [B] after ``marker``."""
    vocabulary, wanted = engine.policy.vocabulary, put(items, engine.device)
    histories = Histories.of_prompts(prompts, vocabulary.marker("gap-0"), engine.device, has_text)
    markers = torch.full_like(wanted, vocabulary.marker(marker))
    targets = Targets(histories, np.arange(len(items)), markers, wanted)
    return SidBatch(targets, whole, len(histories.tokens) + len(items) * engine.trie.levels)


def sid_nll(engine: Engine, batch: SidBatch) -> Tensor:
    """Summed negative log-likelihood of a micro-batch's items over the whole batch's number of them."""
    return -target_log_probs(engine, batch.targets, None, 0).sum() / batch.whole


@dataclass(frozen=True)
class AlignBatch:
    """What a micro-batch of a step reads, by task."""

    micro_batch: MicroBatch
    of: dict[str, Any]

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.of.values())


class AlignStage:
    """The item-level tasks, a batch of each a step; a task of count 0 or without data (no titles, no pairs) is left
    out. Raises InputError where none is left for the stage's steps."""

    name = "align"

    def __init__(self, engine: Engine) -> None:
        settings = self.config = engine.config.align
        self.policy = engine.policy
        held_out = held_out_items(engine)
        train, held = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self.tasks: dict[str, Task[Any]] = {}
        if settings.titles:
            titles = TitleToSid(engine, settings.titles, held_out)
            if len(titles.items):
                self.tasks["title_sid"] = titles
        for name, count, examples in (
            ("sid_title", settings.sid_titles, title_examples),
            ("sid_attributes", settings.attributes, attribute_examples),
        ):
            if count and (wanted := examples(engine, train)):
                self.tasks[name] = SidToText(engine, name, count, wanted, examples(engine, held))
        if settings.pairs:
            first_day = int(engine.log.time.min() // DAY)
            before_day = first_day + round((engine.fit_until - first_day) * PAIR_DAYS)
            pairs = CoDisliked(engine, settings.pairs, before_day, settings.held_out)
            if len(pairs.users):
                self.tasks["pair"] = pairs
        if settings.steps and not self.tasks:
            raise InputError("align: every task is off or without data, expected at least one; or set align.steps=0")

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> AlignBatch:
        return AlignBatch(micro_batch, {name: task.read(step, micro_batch) for name, task in self.tasks.items()})

    def step(self, batch: AlignBatch) -> StepResult:
        self.policy.block.scale.fill_(1.0)  # the weights of --init come with the one that their valid days wanted
        losses = {name: task.loss(batch.of[name]) for name, task in self.tasks.items()}
        metrics: dict[str, Mean | float | None] = {
            f"{name}_nll": batch.micro_batch.part(loss) for name, loss in losses.items()
        }
        return StepResult(torch.stack(list(losses.values())).sum(), metrics, batch.tokens)

    def outcome(self) -> dict[str, float]:
        """The accuracy of every task on what was held out for it, named task_figure."""
        self.policy.eval()
        return {f"{name}_{key}": value for name, task in self.tasks.items() for key, value in task.accuracy().items()}
