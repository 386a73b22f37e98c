"""What goes wrong in a run ends it in one line, without damage, and with a way on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from negfast.config import Grpo, Sft
from negfast.config import Stage as StageSettings
from negfast.errors import TrainingError
from negfast.runtime import checkpoint
from negfast.runtime.run_folder import RunFolder
from negfast.train import faults
from negfast.train.journal import SHOWN, Journal
from negfast.train.step import Figures, MicroBatch
from tests.tiny import SETTINGS, run_cli, train_arguments


class Stage:
    """As much of a stage as advice about memory looks at."""

    def __init__(self, name: str, config: StageSettings) -> None:
        self.name, self.config = name, config


@pytest.fixture
def unfinished(tiny_run, tiny_data, tmp_path) -> Path:
    """A copy of the finished run as it was after its SFT stage: GRPO is still to come."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    description = json.loads((run / "run.json").read_text())
    description["data"] = os.path.relpath(tiny_data, run)
    (run / "run.json").write_text(json.dumps(description))
    for name in ("final", "checkpoints/grpo", "checkpoints/best-grpo"):
        shutil.rmtree(run / name)
    (run / "report.md").unlink()
    for path in checkpoint.step_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    return run


def failure(*command: str) -> str:
    """The one line that a failing command ends with."""
    line = run_cli(*command, code=1).strip().splitlines()[-1]
    assert line.startswith("negfast: ")
    return line


def test_a_loss_that_is_not_finite_leaves_its_batch_and_can_be_replayed(unfinished, monkeypatch):
    weights = unfinished / "checkpoints" / "sft" / "policy.safetensors"
    tensors = load_file(weights)
    tensors["decoder.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    state = {name: value for name, value in checkpoint.read_state(weights.parent).items() if name != "files"}
    checkpoint.write_parts(weights.parent, {weights.name: tensors}, state)
    before = (unfinished / "metrics.jsonl").read_text()
    # validation would refuse such weights before a step does
    monkeypatch.setattr("negfast.train.run.Validation", lambda *_, **__: None)
    said = failure("train", "--out", str(unfinished))
    folder = unfinished / "failed" / "grpo-000001"
    assert "grpo step 1: found loss nan" in said and f"negfast train --replay {folder}" in said
    batch = load_file(folder / "batch.safetensors")
    histories = batch["call0.history_lengths"]
    assert len(histories) == 4 and len(batch["call0.tokens"]) == histories.sum()
    branches = batch["call0.branch_tokens"].shape[:-1].numel()
    assert len(batch["call0.positions"]) == histories.sum() + branches
    kept = [line for line in before.splitlines() if '"grpo"' not in line]
    assert (unfinished / "metrics.jsonl").read_text().splitlines() == kept
    shown = run_cli("train", "--replay", str(folder))
    assert "weights that are not finite: decoder.layers.1.mlp.up_proj.weight" in shown
    assert "first output that is not finite: decoder.layers.1.mlp.up_proj in call 0" in shown
    assert "gradients that are not finite" in shown


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tiny_run, unfinished):
    names = [path.name for path in checkpoint.step_checkpoints(tiny_run / "checkpoints")]
    assert names == ["1-sft-000004", "2-grpo-000002"]
    for name in names:
        shutil.copytree(tiny_run / "checkpoints" / name, unfinished / "checkpoints" / name)
    last = unfinished / "checkpoints" / names[-1] / "optimizer.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert f"{last}: damaged" in run_cli("train", "--out", str(unfinished))
    assert (unfinished / "metrics.jsonl").read_bytes() == (tiny_run / "metrics.jsonl").read_bytes()
    restart = [line for line in (unfinished / "events.jsonl").read_text().splitlines() if '"start"' in line][-1]
    assert json.loads(restart)["resumed_from"] == {"stage": "sft", "step": 6}


def test_a_full_disk_ends_in_one_line_and_leaves_the_checkpoint_before(tmp_path):
    """The largest file that the process may write is made too small for the new weights."""
    folder = tmp_path / "sft"
    checkpoint.save_checkpoint(folder, torch.nn.Linear(4, 4), state={"step": 1})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = (
        "import resource, signal, sys, torch; from pathlib import Path; from negfast.runtime.checkpoint import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        f"save_checkpoint(Path({str(folder)!r}), torch.nn.Linear(400, 400))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    last = result.stderr.strip().splitlines()[-1]
    assert "TrainingError" in last and f"{folder}: cannot be written" in last
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


def test_a_full_disk_under_the_journal_ends_in_one_line(unfinished, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(unfinished / "metrics.jsonl"))

    monkeypatch.setattr("negfast.train.journal.Journal.step", full)
    assert "No space left on device" in failure("train", "--out", str(unfinished))


def test_a_data_file_that_vanished_is_named(unfinished, tiny_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    description = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps({**description, "data": "../data"}))
    (data / "events.nfs").unlink()
    said = run_cli("train", "--out", str(unfinished), code=2).strip().splitlines()[-1]
    assert said.startswith("negfast: ") and "events.nfs" in said
    assert RunFolder(unfinished).exists and (unfinished / "checkpoints" / "sft").is_dir()


def test_memory_that_is_not_there_names_the_setting_to_change(tmp_path):
    stage: Any = Stage("sft", Sft(histories=64))
    policy: Any = torch.nn.Linear(1, 1)
    with (
        pytest.raises(TrainingError) as raised,
        faults.explained(stage, 4, policy, [MicroBatch()], 0, tmp_path) as parts,
    ):
        parts.append(5000)
        torch.empty(1 << 58)
    said = str(raised.value)
    assert "sft step 5: out of memory" in said and "train.token_budget=2500 (now a part has 5000 tokens)" in said


def test_advice_about_cuda_memory_says_by_how_much():
    message = (
        "CUDA out of memory. Tried to allocate 90.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 11.25 GiB "
        "is free. Including non-PyTorch memory, this process has 67.84 GiB memory in use."
    )
    error = torch.OutOfMemoryError(message)
    stage: Any = Stage("grpo", Grpo(histories=32, group=16))
    reused: Any = Stage("grpo", Grpo(histories=32, group=16, epochs=2))  # such a batch is never split

    def advice(stage: Any, tokens: list[int], accumulate: int | None = None) -> str:
        text = faults.memory_advice(error, stage, tokens, accumulate)
        assert text is not None
        return text

    said = advice(stage, [8000, 6000])
    assert "train.token_budget=4000 (now a part has 8000 tokens)" in said
    assert "90.0 GiB more, with 67.8 of 79.1 GiB in use" in said
    assert "set train.accumulate=4 (now 2): the same result" in advice(stage, [8000, 6000], accumulate=2)
    lower = "grpo.histories=16 (now 32) or grpo.group=8 (now 16)"
    assert lower in advice(stage, [500] * 32)  # a history each
    assert lower in advice(reused, [8000])
    assert faults.memory_advice(RuntimeError("shapes do not match"), stage, [8000]) is None


def test_sigterm_saves_like_ctrl_c(unfinished, monkeypatch):
    step = Journal.step

    def terminated(*arguments: Any) -> None:
        step(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "step", terminated)
    said = run_cli("train", "--out", str(unfinished), code=130)
    assert f"stopped at grpo step 1; the checkpoint is written; `negfast train --out {unfinished}` resumes" in said
    assert [p.name for p in checkpoint.step_checkpoints(unfinished / "checkpoints")] == ["2-grpo-000001"]


def test_sigterm_in_a_stages_last_step_stops_before_the_next(tiny_data, tmp_path, monkeypatch):
    run, step = tmp_path / "run", Journal.step

    def terminated(journal: Journal, stage: str, number: int, *rest: Any) -> None:
        step(journal, stage, number, *rest)
        if (stage, number) == ("sft", 6):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "step", terminated)
        said = run_cli(*train_arguments(tiny_data, run), code=130)
    assert f"stopped after sft, which is finished; `negfast train --out {run}` resumes" in said
    assert (run / "checkpoints" / "sft").is_dir() and not (run / "checkpoints" / "grpo").exists()


def test_a_run_goes_on_in_other_ways_to_the_same_result(unfinished):
    """What a message about memory advises can be followed; what would change the result is refused."""
    settings = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    data = RunFolder(unfinished).data
    same = ["train", "--preset", "smoke", *settings, "--data", str(data), "--out", str(unfinished)]
    assert "other settings" in run_cli(*same, "--set", "grpo.lr=0.1", code=2)
    (unfinished / "checkpoints" / ".2-grpo-000002.77.tmp").mkdir()  # of a process that was killed while it wrote
    run_cli(*same, "--set", "train.token_budget=600", "--set", "train.checkpoint_every=1")
    assert RunFolder(unfinished).final.is_dir() and RunFolder(unfinished).config.train.token_budget == 0
    assert not list((unfinished / "checkpoints").glob(".*"))


def test_a_line_of_events_that_was_cut_short_goes(unfinished):
    path = unfinished / "events.jsonl"
    before = path.read_text()
    path.write_text(before + '{"event": "valid", "sta')
    Journal(unfinished, {"align": 4, "sft": 6, "grpo": 4}, {"stage": "align", "step": 4})
    start = '{"event": "start", "resumed_from": {"stage": "align", "step": 4}}'
    assert path.read_text() == before + start + "\n"


def test_tensorboard_gets_the_figures_of_every_step(unfinished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(unfinished, {"align": 4, "sft": 6, "grpo": 4}, {"stage": "align", "step": 4}, tensorboard=True)
    journal.step("sft", 1, Figures(2.5, 0.1, {"nll_dislike": 0.5, "kl": None}, 100), 1e-3, dict.fromkeys(SHOWN, 7.0))
    journal.event("valid", stage="sft", step=1, score=0.75)
    found = EventAccumulator(str(unfinished / "tensorboard"))
    found.Reload()
    scalars = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert scalars["sft/loss"] == [(5, 2.5)] and scalars["valid/score"] == [(5, 0.75)]
    assert scalars["speed/mfu"] == [(5, 7.0)] and "sft/kl" not in scalars
