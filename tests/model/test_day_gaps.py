"""A run whose prompts show the days between items (`prompt.day_gaps`), in order of time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from negfast.data.log import DAY
from negfast.runtime.checkpoint import load_weights
from negfast.runtime.engine import Engine
from negfast.runtime.run_folder import RunFolder
from negfast.train.run import train
from tests.tiny import SETTINGS, run_cli, train_arguments


@pytest.fixture(scope="module")
def gaps_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gaps") / "run"
    settings = SETTINGS | {"prompt.day_gaps": "true", "prompt.layout": "timeline"}
    overrides = tuple(f"{key}={value}" for key, value in settings.items())
    train(config=None, preset="smoke", data=tiny_data, model=None, init=None, out=out, overrides=overrides, table=False)
    return out


def days_told(engine: Engine, user: int, day: int) -> list[int]:
    """The gaps in a user's prompt, each as the fewest days it stands for."""
    tokens = engine.prompts.build(np.array([user]), np.array([day]), 3, 0, trending=False).tokens.tolist()
    markers = engine.policy.vocabulary.gap_markers
    return [1 << (token - markers.start) for token in tokens if token in markers]


def test_prompts_tell_the_days_between_items(gaps_run):
    engine = RunFolder(gaps_run).finished_engine(None)
    log, user = engine.log, 0
    events = slice(log.user_offsets[user], log.user_offsets[user + 1])
    days = log.time[events] // DAY
    assert len(np.unique(log.item[events])) == len(days)  # so that every event is shown
    today = int(days[-1]) + 9
    gaps = np.diff(days, append=today)
    assert days_told(engine, user, today) == [1 << int(np.log2(gap)) for gap in gaps if gap > 0]


def test_training_moves_the_gaps_that_prompts_show(gaps_run):
    run = RunFolder(gaps_run)
    engine = run.finished_engine(None)
    first = engine.policy.vocabulary.gap_markers.start - engine.policy.vocabulary.base
    trained = engine.policy.block.rows[first:].clone()
    load_weights(run.initial, engine.policy)
    moved = (trained - engine.policy.block.rows[first:]).abs().amax(1)
    assert (moved[:3] > 1e-4).all()


def test_the_exported_model_knows_them(gaps_run, tmp_path):
    run_cli("export", str(gaps_run), "--out", str(tmp_path / "exported"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    engine = RunFolder(gaps_run).finished_engine(None)
    assert tokenizer.convert_tokens_to_ids("<|gap_4|>") == engine.policy.vocabulary.gap_markers[2]
    batch = engine.prompts.build(np.array([0]), np.array([engine.data.test_day]), 3, 0, tail="next-dislike")
    hidden = engine.policy.hidden(batch.layout, batch.tokens, None)[-1:]
    with torch.no_grad():
        logits = model(input_ids=batch.tokens[None]).logits[0, -1]
    assert torch.allclose(logits, engine.policy.full_logits(hidden)[0], atol=1e-4)


def test_a_run_without_gaps_cannot_start_from_one_with_them(gaps_run, tiny_data, tmp_path):
    said = run_cli(*train_arguments(tiny_data, tmp_path / "run"), "--init", str(gaps_run), code=2)
    assert f"prompt.day_gaps: found false, but --init {gaps_run} was trained otherwise" in said
