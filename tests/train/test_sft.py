"""What the SFT stage reads."""

import numpy as np
import pytest
import torch

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.runtime.engine import build_engine
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.verdict import group_candidates
from negfast.train import verdict_task
from negfast.train.sft import SftStage


def make_stage(folder, weight: float) -> SftStage:
    run = RunFolder(folder)
    dataset = Dataset.open(run.data)
    config = load_config(folder / "config.toml", None, [f"sft.verdict_weight={weight}"])
    policy, tokenizer = run.load_policy(dataset)
    return SftStage(build_engine(config, dataset, policy, tokenizer, torch.device("cpu")))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_verdicts_are_read_where_they_count(tiny_run, weight):
    stage = make_stage(tiny_run, weight)
    batch = stage.read(0)
    assert (batch.verdicts is not None) == (weight > 0)
    assert ("verdict_bce" in stage.step(batch).metrics) == (weight > 0)


def test_a_log_without_feedback_in_the_train_days_has_no_verdict_loss(tiny_run, monkeypatch):
    none = np.zeros(0, dtype=np.int64)
    nothing = group_candidates(none, none, none), none.astype(np.float32)
    monkeypatch.setattr(verdict_task, "first_feedback_candidates", lambda *_: nothing)
    stage = make_stage(tiny_run, 1.0)
    assert "verdict_bce" not in stage.step(stage.read(0)).metrics
