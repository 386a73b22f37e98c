"""Which histories a step visits, and what it asks of each."""

import numpy as np
import pytest
import torch

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.data.log import DAY
from negfast.runtime.engine import build_engine
from negfast.runtime.run_folder import RunFolder
from negfast.train.sft import SftStage
from negfast.train.step import MicroBatch
from tests.model.naive_histories import naive_start

HISTORIES, MOST = 7, 2


@pytest.fixture
def make_stage(tiny_run):
    def make(context: str) -> SftStage:
        run = RunFolder(tiny_run)
        settings = ("history.window=8", f"history.context={context}", f"sft.histories={HISTORIES}")
        config = load_config(tiny_run / "config.toml", None, [*settings, f"sft.requests_per_history={MOST}"])
        dataset = Dataset.open(run.data)
        policy, tokenizer = run.load_policy(dataset)
        return SftStage(build_engine(config, dataset, policy, tokenizer, torch.device("cpu")))

    return make


def window_of(stage: SftStage, user: int, moment: int) -> tuple[int, int]:
    log = stage.engine.log
    times = log.time[log.user_offsets[user] : log.user_offsets[user + 1]]
    return user, naive_start(int((times < moment).sum()), 8)


def test_an_epoch_visits_every_history_once(make_stage):
    stage = make_stage("day")
    task, requests, window_at = stage.task, stage.task.requests, dict[int, tuple[int, int]]()
    visited, drawn_requests = list[int](), list[int]()
    for step in range(-(-task.size // HISTORIES)):
        drawn = task.draw(step, HISTORIES, MOST)
        assert len(drawn.histories) == HISTORIES
        for place, history in enumerate(drawn.histories.tolist()):
            mine = drawn.requests[drawn.owner == place]
            assert 0 < len(mine) <= MOST
            [window] = {window_of(stage, int(requests.user[row]), (int(requests.day[row]) + 1) * DAY) for row in mine}
            assert window_at.setdefault(history, window) == window
            if len(visited) < task.size:
                visited.append(history)
                drawn_requests += mine.tolist()
    assert sorted(visited) == list(range(task.size))
    assert len(set(window_at.values())) == task.size > stage.engine.log.n_users
    assert len(set(drawn_requests)) == len(drawn_requests) < len(requests)


def test_every_request_is_drawn_sooner_or_later(make_stage):
    task = make_stage("day").task
    steps = range(12 * -(-task.size // HISTORIES))
    drawn = np.concatenate([task.draw(step, HISTORIES, MOST).requests for step in steps])
    assert len(np.unique(drawn)) > 0.95 * len(task.requests)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_micro_batches_are_the_batch_in_parts(make_stage, count):
    stage = make_stage("event")
    for step in range(3):
        whole = stage.read(step)
        parts = [stage.read(step, MicroBatch(index, count)) for index in range(count)]
        items = [part.items for part in parts]
        assert torch.equal(torch.cat([part.histories.tokens for part in parts]), whole.histories.tokens)
        assert torch.equal(torch.cat([part.targets.items for part in items]), whole.items.targets.items)
        assert torch.equal(torch.cat([part.weights for part in items]), whole.items.weights)
        assert {part.requests for part in items} == {whole.items.requests}
