"""Checkpoints in the background: what they hold, and how their failures come out."""

import threading
from typing import Any

import pytest
import torch

from negfast.errors import TrainingError
from negfast.runtime import checkpoint
from negfast.runtime.checkpoint import load_optimizer, load_weights, read_state, step_checkpoints
from negfast.train import stage_checkpoints
from negfast.train.stage_checkpoints import StageCheckpoints


class Journal:
    def __init__(self) -> None:
        self.events: list[dict] = []

    def event(self, kind: str, **fields: object) -> None:
        self.events.append({"event": kind, **fields})


def made(folder, background: bool) -> Any:
    torch.manual_seed(0)
    policy = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(torch.ones(3)).sum().backward()
    optimizer.step()
    journal: Any = Journal()
    return StageCheckpoints(folder, 1, "sft", policy, optimizer, journal, background)


def test_a_checkpoint_of_the_background_holds_the_step_it_was_asked_at(tmp_path, monkeypatch):
    """Training goes on while the writer is held up; what it writes then is what was."""
    writing, go_on, write_parts = threading.Event(), threading.Event(), checkpoint.write_parts

    def held_up(*arguments) -> None:
        writing.set()
        assert go_on.wait(20)
        write_parts(*arguments)

    monkeypatch.setattr(stage_checkpoints, "write_parts", held_up)
    saved = made(tmp_path, background=True)
    before = saved.policy.weight.detach().clone()
    saved.save(2, wait=False)
    assert writing.wait(20) and step_checkpoints(tmp_path) == [] and saved.journal.events == []
    saved.optimizer.step()
    go_on.set()
    saved.wait()
    (found,) = step_checkpoints(tmp_path)
    checkpoint.check_checkpoint(found)
    assert read_state(found)["step"] == 2
    assert saved.journal.events == [{"event": "checkpoint", "stage": "sft", "step": 2}]
    assert not torch.equal(saved.policy.weight, before)
    load_weights(found, saved.policy)
    assert torch.equal(saved.policy.weight, before)


def test_background_and_foreground_write_the_same_bytes_and_keep_the_last(tmp_path):
    for name, background in (("there", True), ("here", False)):
        saved = made(tmp_path / name, background)
        for step in (2, 4, 6):
            saved.save(step, wait=step == 6)
    here, there = (
        [{f.name: f.read_bytes() for f in path.iterdir()} for path in step_checkpoints(tmp_path / name)]
        for name in ("here", "there")
    )
    assert here == there and len(here) == 2


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    saved = made(tmp_path, background=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saved.save(2, wait=False)
    with pytest.raises(TrainingError, match="No space left on device; what was there before is good"):
        saved.save(4, wait=False)


def test_an_optimiser_comes_back_to_where_its_parameters_lie(tmp_path):
    """The file is read into this machine's memory; AdamW wants its moments beside the weights."""
    saved = made(tmp_path, background=False)
    saved.save(2, wait=True)
    (found,) = step_checkpoints(tmp_path)
    elsewhere = torch.nn.Linear(3, 3, device="meta")
    optimizer = torch.optim.AdamW(elsewhere.parameters())
    load_optimizer(found, elsewhere, optimizer)
    assert {value.device.type for entry in optimizer.state.values() for value in entry.values()} == {"meta"}


def test_best_weights_newer_than_the_checkpoint_keep_their_own_score(tmp_path):
    """A kill between the two; on CUDA the steps that follow need not give the same score again."""
    saved = made(tmp_path, background=False)
    saved.save(2, wait=True)
    saved.consider(3, lambda: {"score": 0.7})
    best = saved.policy.weight.detach().clone()
    again = made(tmp_path, background=False)
    assert again.resume(step_checkpoints(tmp_path)[0]) == 2
    with torch.no_grad():
        again.policy.weight.add_(1)
    again.consider(3, lambda: {"score": 0.6})
    again.finish(3, chosen=True)
    assert again.journal.events[-1] == {"event": "chosen", "stage": "sft", "step": 3, "score": 0.7}
    assert torch.equal(again.policy.weight, best)
