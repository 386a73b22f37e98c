"""What the SFT stage reads."""

import numpy as np
import pytest
import torch

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.runtime.engine import build_engine
from negfast.runtime.run_folder import RunFolder
from negfast.train.sft import SftStage


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_verdicts_are_read_where_they_count(tiny_run, weight):
    run = RunFolder(tiny_run)
    dataset = Dataset.open(run.data)
    config = load_config(tiny_run / "config.toml", None, [f"sft.verdict_weight={weight}"])
    policy, tokenizer = run.load_policy(dataset)
    stage = SftStage(build_engine(config, dataset, policy, tokenizer, torch.device("cpu")))
    assert ("verdict_bce" in stage.step(stage.read(0)).metrics) == (weight > 0)
    stage.verdict.candidates = stage.verdict.candidates.take(np.zeros(0, np.int64))[0]  # a log without any
    assert "verdict_bce" not in stage.step(stage.read(0)).metrics
