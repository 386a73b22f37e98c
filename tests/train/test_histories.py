"""Which histories a step visits, and what it asks of each."""

import numpy as np
import pytest
import torch

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.data.log import DAY, DISLIKE, LIKE
from negfast.runtime.engine import build_engine
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.verdict import verdict_start
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


@pytest.mark.parametrize("context", ["day", "event"])
def test_an_epoch_visits_every_history_once_and_asks_all_its_verdicts(make_stage, context):
    stage = make_stage(context)
    task, log, candidates = stage.task, stage.engine.log, stage.verdicts.candidates
    requests, window_at = task.requests, dict[int, tuple[int, int]]()
    visited, groups, drawn_requests = list[int](), list[int](), list[int]()
    for step in range(-(-task.size // HISTORIES)):
        drawn = task.draw(step, HISTORIES, MOST)
        assert len(drawn.histories) == HISTORIES
        for place, history in enumerate(drawn.histories.tolist()):
            mine = drawn.requests[drawn.request_history == place]
            asked = drawn.groups[drawn.group_history == place]
            assert len(mine) <= MOST and len(mine) + len(asked) > 0
            moments = [(int(requests.user[row]), (int(requests.day[row]) + 1) * DAY) for row in mine]
            moments += [(int(candidates.user[row]), int(candidates.moment[row])) for row in asked]
            [window] = {window_of(stage, *pair) for pair in moments}
            assert window_at.setdefault(history, window) == window
            if len(visited) < task.size:
                visited.append(history)
                groups += asked.tolist()
                drawn_requests += mine.tolist()
    assert sorted(visited) == list(range(task.size))
    assert len(set(window_at.values())) == task.size > log.n_users
    assert len(set(drawn_requests)) == len(drawn_requests) < len(requests)

    first: dict[tuple[int, int], int] = {}
    for row, (user, item, kind) in enumerate(zip(log.user.tolist(), log.item.tolist(), log.feedback, strict=True)):
        if kind in (LIKE, DISLIKE):
            first.setdefault((user, item), row)
    days = range(verdict_start(log, stage.engine.fit_until), stage.engine.fit_until)
    moments = log.moments(context)
    wanted = sorted(
        (user, item, int(moments[row]), float(log.feedback[row] == DISLIKE))
        for (user, item), row in first.items()
        if log.day[row] in days
    )
    part, places = candidates.take(np.array(groups))
    owner = part.group_of_item
    columns = (part.user[owner], part.items, part.moment[owner], stage.verdicts.labels[places])
    assert sorted(zip(*(column.tolist() for column in columns), strict=True)) == wanted


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
        assert whole.items is not None and whole.verdicts is not None
        items = [part.items for part in parts if part.items is not None]
        verdicts = [part.verdicts for part in parts if part.verdicts is not None]
        assert torch.equal(torch.cat([part.histories.tokens for part in parts]), whole.histories.tokens)
        assert torch.equal(torch.cat([part.targets.items for part in items]), whole.items.targets.items)
        assert torch.equal(torch.cat([part.weights for part in items]), whole.items.weights)
        assert torch.equal(torch.cat([part.inputs.tokens for part in verdicts]), whole.verdicts.inputs.tokens)
        assert torch.equal(torch.cat([part.labels for part in verdicts]), whole.verdicts.labels)
        assert {part.requests for part in items} == {whole.items.requests}
        assert {part.candidates for part in verdicts} == {whole.verdicts.candidates}
