"""Settings of SFT's context: varied horizons and dropped history, the same whatever the shares."""

import numpy as np
import pytest
import torch

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.data.log import DISLIKE, LIKE
from negfast.data.split import cut_futures, days_ahead
from negfast.runtime.engine import build_engine
from negfast.runtime.run_folder import RunFolder
from negfast.train.sft import NextItems, SftStage
from negfast.train.step import Share


def test_futures_cut_at_a_horizon_against_a_search_of_the_log(tiny_data):
    data = Dataset.open(tiny_data)
    log, requests = data.log, data.split().train
    ahead = days_ahead(log, requests)
    horizons = np.random.default_rng().integers(1, data.horizon + 1, len(requests))
    cut = cut_futures(requests, ahead, horizons)
    assert ahead.dislikes.min() >= 1 and ahead.likes.max() <= data.horizon
    for row in range(0, len(requests), 7):
        user, day = requests.user[row], requests.day[row]
        near = (log.user == user) & (log.day > day) & (log.day <= day + horizons[row])
        for offsets, items, whole_offsets, whole, kind in (
            (cut.dislike_offsets, cut.dislikes, requests.dislike_offsets, requests.dislikes, DISLIKE),
            (cut.like_offsets, cut.likes, requests.like_offsets, requests.likes, LIKE),
        ):
            future = set(whole[whole_offsets[row] : whole_offsets[row + 1]].tolist())
            expected = future & set(log.item[near & (log.feedback == kind)].tolist())
            assert items[offsets[row] : offsets[row + 1]].tolist() == sorted(expected)
    assert 0 < len(cut.dislikes) < len(requests.dislikes)


@pytest.mark.parametrize("setting", ["sft.context_dropout=0.5", "sft.varied_horizon=true"])
def test_a_context_setting_changes_the_loss_and_shares_add_up(tiny_run, setting):
    run = RunFolder(tiny_run)
    dataset = Dataset.open(run.data)
    losses, tokens = {}, {}
    for name, overrides in (("off", []), ("on", [setting])):
        config = load_config(tiny_run / "config.toml", None, overrides)
        policy, tokenizer = run.load_policy(dataset)
        engine = build_engine(config, dataset, policy, tokenizer, torch.device("cpu"), run.mass_weights)
        torch.manual_seed(0)
        for weight in policy.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        task = NextItems(engine, config.sft)
        whole, parts = task.read(1), [task.read(1, Share(index, 3)) for index in range(3)]
        tokens[name] = whole.tokens
        assert sum(part.tokens for part in parts) == tokens[name]
        loss, _ = task.loss(whole)
        torch.testing.assert_close(sum(task.loss(part)[0] for part in parts), loss, rtol=1e-4, atol=1e-5)
        losses[name] = loss.item()
    assert losses["on"] != losses["off"] and tokens["on"] < tokens["off"]


def test_a_random_horizon_leaves_every_request_a_future(tiny_run):
    run = RunFolder(tiny_run)
    dataset = Dataset.open(run.data)
    config = load_config(tiny_run / "config.toml", None, ["sft.varied_horizon=true", "sft.requests=1"])
    policy, tokenizer = run.load_policy(dataset)
    task = NextItems(
        build_engine(config, dataset, policy, tokenizer, torch.device("cpu"), run.mass_weights), config.sft
    )
    counts = [len(task.read(step).items) for step in range(300)]
    assert min(counts) > 0 and max(counts) > 1


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_verdicts_are_read_where_they_count(tiny_run, weight):
    run = RunFolder(tiny_run)
    dataset = Dataset.open(run.data)
    config = load_config(tiny_run / "config.toml", None, [f"sft.verdict_weight={weight}"])
    policy, tokenizer = run.load_policy(dataset)
    stage = SftStage(build_engine(config, dataset, policy, tokenizer, torch.device("cpu"), run.mass_weights))
    assert ("verdict_bce" in stage.step(stage.read(0)).metrics) == (weight > 0)
    stage.verdict.candidates = stage.verdict.candidates.take(np.zeros(0, np.int64))[0]  # a log without any
    assert "verdict_bce" not in stage.step(stage.read(0)).metrics
