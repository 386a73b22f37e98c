"""Batches that are read ahead: the same ones, in time, and all of their tensors known."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from negfast import spans
from negfast.config import Train
from negfast.errors import InputError
from negfast.runtime.run_folder import RunFolder
from negfast.staging import tensors_in
from negfast.train.journal import Journal
from negfast.train.reader import read_ahead, read_steps
from negfast.train.speed import Meter
from negfast.train.step import MicroBatch
from negfast.train.text import PackedText
from tests.tiny import run_cli, train_arguments
from tests.train.rank_gradients import opened_stages
from tests.train.small import make_small

CPU = torch.device("cpu")


@dataclass
class Slow:
    """A stage whose reading takes a while."""

    seconds: float
    name: str = "sft"

    def read(self, step: int, micro_batch: MicroBatch) -> int:
        time.sleep(self.seconds)
        if step == 3:
            raise InputError("damaged")
        return step


@pytest.mark.parametrize("prefetch", ["on", "off"])
def test_the_wait_that_is_logged_is_the_wait_there_was(prefetch):
    """With reading of 0.1 s and computing of 0.2 s only the first step waits for a batch that is read ahead."""
    stage: Any = Slow(0.1)
    reader: Iterator[Any] = read_steps(stage, range(3), [MicroBatch()], Train(prefetch=prefetch), CPU)
    meter, waits = Meter(make_small(0).policy), []
    for step in range(3):
        with meter.step():
            with spans.data():
                assert next(reader) == [step]
            time.sleep(0.2)
        waits.append(meter.figures(1)["data_wait"])
    assert waits[0] == pytest.approx(1 / 3, abs=0.15)
    assert waits[1:] == pytest.approx([0.0, 0.0] if prefetch == "on" else [1 / 3, 1 / 3], abs=0.15)


@pytest.mark.parametrize("prefetch", ["on", "off"])
def test_what_reading_raises_comes_out_at_its_step(prefetch):
    stage: Any = Slow(0.0)
    reader: Iterator[Any] = read_steps(stage, range(2, 5), [MicroBatch()], Train(prefetch=prefetch), CPU)
    assert next(reader) == [2]
    with pytest.raises(InputError, match="damaged"):
        next(reader)


def test_a_run_that_reads_ahead_writes_the_same_figures_and_goes_on_exactly(tiny_run, tiny_data, tmp_path, monkeypatch):
    """It is interrupted on the way, with a batch read that no step has seen."""
    run = tmp_path / "run"
    command = train_arguments(tiny_data, run, train__prefetch="on")
    write = Journal.step

    def stop_in_sft(journal: Journal, stage: str, step: int, *rest: Any) -> None:
        if (stage, step) == ("sft", 3):
            raise KeyboardInterrupt
        write(journal, stage, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "step", stop_in_sft)
        run_cli(*command, code=130)
    run_cli(*command)
    assert (run / "metrics.jsonl").read_bytes() == (tiny_run / "metrics.jsonl").read_bytes()
    starts = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert [start["resumed_from"] for start in starts] == [None, {"stage": "sft", "step": 2}]


def test_every_tensor_of_a_batch_is_found(tiny_run):
    """On CUDA each is told which stream uses it: those of the prior are made while reading and must be among them."""
    for _, stage in opened_stages(RunFolder(tiny_run)):
        batch = stage.read(0)
        found = {tensor.data_ptr() for tensor in tensors_in(batch)}
        if stage.name == "align":
            texts = [part for part in batch.of.values() if isinstance(part, PackedText)]
            items = [part.targets for part in batch.of.values() if not isinstance(part, PackedText)]
            wanted = [part.token_ids for part in texts] + [targets.histories.tokens for targets in items]
            assert len(texts) == len(items) == 2
        else:
            histories, prior = batch.histories, batch.histories.prior
            wanted = [histories.tokens, histories.gap, histories.layout.positions]
            wanted += [bucket.pad_index for bucket in histories.layout.buckets if bucket.pad_index is not None]
            wanted += [prior.day_row, *prior.seen.key, *prior.seen_mass]
            wanted += [batch.items.weights] if stage.name == "sft" else [batch.groups.ids, batch.groups.rewards.terms]
        assert {tensor.data_ptr() for tensor in wanted} <= found


def test_a_batch_knows_how_many_tokens_go_through_the_policy(tiny_run):
    for policy, stage in opened_stages(RunFolder(tiny_run)):
        batch, rows = stage.read(1), list[int]()
        hook = policy.decoder.register_forward_pre_hook(
            lambda _, __, inputs, rows=rows: rows.append(inputs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        with torch.no_grad():
            taken = stage.step(batch).tokens
        hook.remove()
        if stage.name == "grpo":  # a marker a group beside; of the completions only those that are not forced
            assert taken == sum(rows) - len(batch.groups.ids) <= batch.tokens
        else:
            assert batch.tokens == taken == sum(rows)


def test_reads_ahead_in_order_and_passes_errors_on():
    started = []

    def read(place: int) -> int:
        started.append(place)
        time.sleep(0.02 * (len(started) % 2))  # later reads may be done first
        if place == 9:
            raise InputError("damaged")
        return place

    reads = read_ahead(read, range(10), workers=3, ahead=4)
    first = next(reads)
    time.sleep(0.1)
    assert len(started) == 4  # the one given and what is read ahead of its use
    assert [first, *(next(reads) for _ in range(8))] == list(range(9))
    with pytest.raises(InputError, match="damaged"):
        next(reads)
