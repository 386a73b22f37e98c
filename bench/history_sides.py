"""The sides of `bench histories` that this checkout computes, each in a process of its own.

``python -m bench.history_sides '{"side": ..., "data": ..., ...}'`` prepares itself and says so in a line of JSON; at
each line on stdin it makes the next step and answers with the step's figures. So sides take turns on the machine, and
the memory of each is its own.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.machine import resident_mib
from bench.sft import Turns, make_trainer
from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.model.histories import Histories
from negfast.model.layout import GroupLayout
from negfast.model.load import build_policy, small_qwen3
from negfast.runtime.engine import build_engine, feature_width
from negfast.train.histories import Drawn
from negfast.train.loop import update
from negfast.train.optimizer import make_optimizer
from negfast.train.order import task_rng
from negfast.train.sft import SftBatch, SftStage, draw_views
from negfast.train.speed import Meter, attention_pairs
from negfast.train.step import MicroBatch

AT_ONCE = 16_384  # positions of a micro-batch, about
ROWS = 128  # targets of a step that the Trainer gets
MICRO_BATCHES = 8, 32, 64
CPU = torch.device("cpu")

Row = dict[str, Tensor]


def open_stage(data: Path, overrides: list[str]) -> SftStage:
    """The quickstart's SFT stage on a data set, with untrained weights."""
    config, dataset = load_config(None, "quickstart", overrides), Dataset.open(data)
    torch.manual_seed(0)
    shape = dataset.codes.shape[1], int(dataset.manifest["semantic_ids"]["codebook"])
    features = feature_width(dataset)
    texts = [text for text in dataset.items.text if text.strip()] or ["text"]
    policy, tokenizer = build_policy(config.model, None, texts, *shape, features)
    return SftStage(build_engine(config, dataset, policy, tokenizer, CPU))


def shared(stage: SftStage, step: int, parts: int) -> list[SftBatch]:
    """The engine's own batches of a step: whole histories."""
    parts = min(parts, stage.config.histories, stage.task.size)
    return [stage.read(step, MicroBatch(part, parts)) for part in range(parts)]


def apart(stage: SftStage, step: int, parts: int) -> list[SftBatch]:
    """The same step with a history of its own for every request."""
    settings, task = stage.config, stage.task
    drawn = task.draw(step, settings.histories, settings.requests_per_history)
    rng = task_rng(stage.engine.config.train.seed, "views", step)
    views = draw_views(len(drawn.histories), settings.negative_view, settings.positive_view, rng)
    views, every = views[drawn.owner], np.arange(len(drawn.requests))
    drawn = Drawn(every, drawn.requests, every)
    batches, parts = [], min(parts, len(every))
    for micro_batch in (MicroBatch(part, parts) for part in range(parts)):
        histories = unshared(task.read(drawn, micro_batch, views))
        items = stage.next_items.read(histories, drawn, step, micro_batch)
        batches.append(SftBatch(micro_batch, histories, items))
    return batches


def unshared(histories: Histories) -> Histories:
    """A history for each request: what of its own it sees."""
    begins = np.cumsum(histories.layout.host_lengths) - histories.layout.host_lengths
    offsets = np.concatenate([[0], np.cumsum(histories.prefix)])
    rows = np.arange(offsets[-1]) + np.repeat(begins[histories.history] - offsets[:-1], histories.prefix)
    layout, every = GroupLayout.build(offsets, CPU), np.arange(len(histories.prefix))
    return replace(histories, tokens=histories.tokens[torch.from_numpy(rows)], layout=layout, history=every)


def count_targets(batches: list[SftBatch]) -> int:
    """Next dislikes and next likes."""
    return sum(len(batch.items.targets.items) for batch in batches)


class Counter(Meter):
    """Counts attention's pairs of query and key, of one layer, too."""

    pairs = 0.0

    def _count(self, module: nn.Module, arguments: tuple, inputs: dict) -> None:
        super()._count(module, arguments, inputs)
        self.pairs += sum(attention_pairs(inputs["layout"]))


class Engine:
    """The training loop's step over batches that ``read`` gives, in micro-batches of about `AT_ONCE` positions."""

    def __init__(self, stage: SftStage, read: Callable[[SftStage, int, int], list[SftBatch]]) -> None:
        self.stage, self.policy = stage, stage.engine.policy
        config = stage.engine.config
        self.train, self.optimizer = config.train, make_optimizer(self.policy, config.sft, config.train)
        self.counter = Counter(self.policy)
        whole = sum(batch.tokens for batch in read(stage, 0, 1))
        parts = math.ceil(whole / AT_ONCE)
        self.read = lambda step: read(stage, step, parts)

    def step(self, step: int) -> dict[str, float]:
        self.counter.operations = self.counter.pairs = 0.0
        began = time.perf_counter()
        batches: list[Any] = self.read(step)
        targets, positions = count_targets(batches), sum(batch.tokens for batch in batches)
        with self.counter:
            figures = update(self.stage, self.policy, self.optimizer, 1e-5, self.train.clip_norm, batches)
        return {
            "seconds": time.perf_counter() - began,
            "targets": targets,
            "positions": positions,
            "pairs": self.counter.pairs,
            "flops": self.counter.operations,
            "loss": figures.loss,
        }


def rows_of(stage: SftStage, batch: SftBatch) -> list[Row]:
    """A row for each target: what it sees, then its own positions, sums of tokens [n, S]; labels int64 [n]."""
    histories, builder, vocabulary = batch.histories, stage.engine.histories, stage.engine.policy.vocabulary
    seen = histories.tokens.split(histories.layout.host_lengths.tolist())
    targets, rows = batch.items.targets, []
    own = builder.target_tokens(targets.markers, histories.gap[torch.from_numpy(targets.requests)], targets.items)
    own = F.pad(own, (0, histories.tokens.shape[1] - own.shape[2]), value=vocabulary.marker("none"))
    labels = builder.item_token_ids[targets.items]
    for request, tokens, wanted in zip(targets.requests.tolist(), own, labels, strict=True):
        ids = torch.cat([seen[request], tokens])
        rows.append({"input_ids": ids, "labels": F.pad(wanted, (len(ids) - len(wanted), 0), value=-100)})
    return rows


class RowModel(nn.Module):
    """The decoder as transformers has it, over rows of sums; logits at labels alone, over markers and codes.

    Rows are padded on the right, where a causal decoder needs no mask. A general user's model would spend more: a mask,
    and logits at every position.
    """

    def __init__(self, stage: SftStage) -> None:
        super().__init__()
        vocabulary, shape = stage.engine.policy.vocabulary, stage.engine.config.model
        self.base, self.none = vocabulary.base, vocabulary.marker("none") - vocabulary.base
        self.decoder = small_qwen3(shape, vocabulary.base).get_decoder()
        self.decoder.set_attn_implementation("sdpa")
        self.rows = nn.Parameter(torch.randn(vocabulary.size, shape.hidden) * 0.02)
        self.head = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``input_ids`` [B, n, S], ``labels`` [B, n]."""
        sums = (input_ids - self.base).flatten(0, 1)
        embedded = F.embedding_bag(sums, self.rows, mode="sum", padding_idx=self.none)
        hidden = self.decoder(inputs_embeds=embedded.unflatten(0, labels.shape), use_cache=False).last_hidden_state
        wanted = labels != -100
        logits = self.head(hidden[wanted]) @ self.rows.T
        return {"loss": F.cross_entropy(logits, labels[wanted] - self.base)}


class Peer:
    """transformers' Trainer: a row a target, equally many a step, sorted by length before they are padded."""

    def __init__(self, stage: SftStage, steps: int, most: int = ROWS) -> None:
        rng, self.stage = np.random.default_rng(0), stage
        found = [[row for batch in apart(stage, step, 1) for row in rows_of(stage, batch)] for step in range(steps)]
        size = min(most, *map(len, found))
        self.sizes = [number for number in MICRO_BATCHES if number <= size] or [size]
        self.size, self.steps = size // max(self.sizes) * max(self.sizes), []
        for rows in found:
            drawn = [rows[place] for place in rng.choice(len(rows), self.size, replace=False)]
            self.steps.append(sorted(drawn, key=lambda row: len(row["labels"])))
        self.meter = Meter(stage.engine.policy)

    def figures(self, step: int, micro_batch: int, seconds: float) -> dict[str, float]:
        """As the engine's: of positions with padding, and causal pairs; heads are left out on all sides."""
        lengths = [len(row["labels"]) for row in self.steps[step]]
        padded = np.repeat(lengths[micro_batch - 1 :: micro_batch], micro_batch).astype(float)
        positions, pairs = padded.sum(), (padded * (padded + 1) / 2).sum()
        flops = 3.0 * self.meter.layers * (2 * self.meter.weights * positions + self.meter.pair * pairs)
        return {"seconds": seconds, "targets": len(lengths), "positions": positions, "pairs": pairs, "flops": flops}

    def train(self, micro_batch: int, after: Callable[[Turns], None]) -> Turns:
        """Runs all steps, and ``after`` at the end of each, outside of the clock."""
        none = self.stage.engine.policy.vocabulary.marker("none")

        def collate(rows: list[Row]) -> Row:
            fill = {"input_ids": none, "labels": -100}
            return {
                name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
                for name, value in fill.items()
            }

        turns: Turns = Turns(lambda: after(turns))
        rows, accumulate = [row for step in self.steps for row in step], self.size // micro_batch
        model = RowModel(self.stage)
        made = make_trainer(model, rows, collate, micro_batch, accumulate, len(self.steps), turns, order="sequential")
        made.train()
        return turns


class Turn:
    """The other end of `bench.histories.Side`."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not stand among the answers

    def answer(self, **figures: Any) -> None:
        print(json.dumps(figures), file=self.answers, flush=True)

    def wait(self) -> None:
        """Until a step is asked for; ends the process where none is."""
        if not sys.stdin.readline():
            sys.exit(0)


def main(task: dict[str, Any]) -> None:
    """Runs the side that ``task`` names."""
    turn, steps = Turn(), task["steps"]
    torch.set_num_threads(task["threads"])
    stage = open_stage(Path(task["data"]), task["overrides"])
    if task["side"] == "sweep":
        peer, swept = Peer(stage, 2, max(MICRO_BATCHES)), {}
        for size in peer.sizes:
            turns = peer.train(size, lambda _: None)
            swept[size] = turns.seconds[-1]
        turn.answer(sweep_s=swept)
    elif task["side"] == "trainer":
        peer, micro_batch = Peer(stage, steps), task["micro_batch"]

        def after(turns: Turns) -> None:
            made = len(turns.seconds)
            figures = peer.figures(made - 1, micro_batch, turns.seconds[-1])
            turn.answer(**figures, peak_mib=resident_mib(peak=True))
            if made < steps:
                turn.wait()

        turn.answer(start_mib=resident_mib())
        turn.wait()
        peer.train(micro_batch, after)
    else:
        engine = Engine(stage, {"histories": shared, "requests": apart}[task["side"]])
        turn.answer(start_mib=resident_mib())
        for step in range(steps):
            turn.wait()
            turn.answer(**engine.step(step), peak_mib=resident_mib(peak=True))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
