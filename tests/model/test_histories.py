"""What a branch sees: its window of the events before its moment, and nothing of what comes after."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.data.log import DAY, DISLIKE, LIKE, EventLog
from negfast.data.shards import open_shard, write_shard
from negfast.data.split import Requests
from negfast.model.histories import MIXED, NEGATIVE_ONLY, POSITIVE_ONLY, window_start
from negfast.runtime.engine import Engine, build_engine
from negfast.runtime.generation import generate
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.verdict import Candidates, candidate_logits
from negfast.train.expected import expected_rewards, reward_table
from tests.model.naive_histories import naive_prefix, naive_start


@given(window=st.integers(4, 600), events=st.integers(0, 3000))
def test_a_window_holds_the_latest_events(window, events):
    start = int(window_start(np.array([events]), window)[0])
    assert start == naive_start(events, window)
    assert min(events, window // 4) <= events - start <= window


@pytest.fixture
def make_engine(tiny_run) -> Callable[..., Engine]:
    """The finished engine with a code head that speaks, of the tiny data set or with another log."""
    run = RunFolder(tiny_run)
    torch.manual_seed(3)
    policy, tokenizer = run.load_policy(Dataset.open(run.data))
    policy.load_state_dict(RunFolder(tiny_run).finished_engine(None).policy.state_dict())
    torch.nn.init.normal_(policy.block.head.weight, std=0.3)

    def make(*overrides: str, log: EventLog | None = None, folder: Path | None = None) -> Engine:
        config, data = load_config(tiny_run / "config.toml", None, overrides), Dataset.open(run.data)
        if log is not None and folder is not None:
            write_shard(folder / "events.nfs", log)
            vars(data).update(log=log, shard=open_shard(folder / "events.nfs"))
        return build_engine(config, data, policy, tokenizer, torch.device("cpu"))

    return make


@pytest.mark.parametrize("positions", ["events", "codes"])
@pytest.mark.parametrize("view", [MIXED, NEGATIVE_ONLY, POSITIVE_ONLY])
def test_histories_are_those_written_out_event_by_event(make_engine, positions, view):
    engine = make_engine("history.window=8", f"history.positions={positions}")
    log, rng = engine.log, np.random.default_rng(1)
    users = np.repeat(rng.choice(log.n_users, 5, replace=False), 12)
    first, last = int(log.time.min()), int(log.time.max())
    moments = rng.integers(first - DAY, last + DAY, len(users))
    moments[::3] = log.time[log.user_offsets[users[::3]] + rng.integers(0, 48, 20)]  # the very second of an event
    order = np.lexsort((moments, users))
    users, moments = users[order], moments[order]
    found = engine.histories.build(users, moments, view)
    assert 5 < found.layout.prompts < len(users)  # windows, shared
    none = engine.policy.vocabulary.marker("none")
    begins = np.concatenate([[0], np.cumsum(found.layout.host_lengths)])
    for row, (user, moment) in enumerate(zip(users, moments, strict=True)):
        begin = begins[found.history[row]]
        tokens = found.tokens[begin : begin + found.prefix[row]].tolist()
        positions_found = [sorted(token for token in ids if token != none) for ids in tokens]
        wanted, gap = naive_prefix(engine, user, moment, view)
        assert positions_found == [sorted(ids) for ids in wanted]
        assert int(found.gap[row]) == gap


def asked(engine: Engine, moments: list[int], requests: Requests, table) -> list[np.ndarray]:
    """Verdict logits [U, M, 3] at moments of every user, and of requests the lists, their scores and what they earn."""
    users = np.arange(engine.log.n_users, dtype=np.int32)
    asked, rng = 3 * len(moments), np.random.default_rng(0)
    candidates = Candidates(
        np.repeat(users, asked),
        rng.integers(0, engine.log.n_items, len(users) * asked, dtype=np.int32),
        np.tile(np.repeat(np.array(moments, dtype=np.int64), 3), len(users)),
    )
    logits = candidate_logits(engine, candidates).reshape(len(users), len(moments), 3)
    return [logits, *generate(engine, requests, 10), expected_rewards(engine, requests, table)]


def changed(log: EventLog, rows: np.ndarray) -> EventLog:
    """Other items and the opposite feedback at ``rows``."""
    item, feedback = log.item.copy(), log.feedback.copy()
    item[rows] = (item[rows] + 1 + np.random.default_rng(2).integers(0, log.n_items - 1, len(rows))) % log.n_items
    feedback[rows] = LIKE + DISLIKE - feedback[rows]
    return replace(log, item=item, feedback=feedback)


def with_more(log: EventLog, moment: int) -> EventLog:
    """Two more events of every user: one at the moment itself, one later."""
    rng, users = np.random.default_rng(4), np.arange(log.n_users)
    user = np.concatenate([log.user, users, users])
    time = np.concatenate([log.time, np.full(len(users), moment), moment + rng.integers(1, 5 * DAY, len(users))])
    order = np.lexsort((time, user))
    assert log.value is not None
    more = 2 * len(users)
    return EventLog(
        np.concatenate([[0], np.cumsum(np.bincount(user))]),
        np.append(log.item, rng.integers(0, log.n_items, more, dtype=np.int32))[order],
        np.append(log.feedback, rng.integers(LIKE, DISLIKE + 1, more, dtype=np.uint8))[order],
        time[order],
        np.append(log.value, rng.integers(1, 6, more).astype(np.float32))[order],
        log.n_items,
    )


@pytest.mark.parametrize("context", ["day", "event"])
def test_events_at_or_after_the_moment_change_no_bit_and_those_before_do(make_engine, tmp_path, context):
    overrides = (f"history.context={context}", "history.window=16")
    engine = make_engine(*overrides)
    log, split = engine.log, engine.split
    day = split.test_day + 3
    moment = (day + 1) * DAY
    if context == "event":  # the second of somebody's event
        moment = int(log.time[log.time >= moment + DAY // 3].min())
    near = split.test.take(split.test.day <= day)
    table = reward_table(engine, near)
    later = log.time >= moment
    earlier = [moment - 9 * DAY, moment]
    before = asked(engine, earlier, near, table)
    others = {
        "changed": changed(log, np.flatnonzero(later)),
        "more": with_more(log, moment),
        "fewer": log.without(later),
    }
    others["half"] = log.without(later & (np.arange(len(log)) % 2 == 0))
    for name, other in others.items():
        folder = tmp_path / name
        folder.mkdir()
        after = asked(make_engine(*overrides, log=other, folder=folder), earlier, near, table)
        for found, wanted in zip(after, before, strict=True):
            assert np.array_equal(found, wanted), name
    # beside later questions, which share histories with these
    moments, every = [*earlier, moment + 4 * DAY], split.test.take()
    table = reward_table(engine, every)
    logits, items, scores, earned = asked(engine, moments, every, table)
    (tmp_path / "shared").mkdir()
    again = asked(make_engine(*overrides, log=others["changed"], folder=tmp_path / "shared"), moments, every, table)
    now = every.day <= day
    assert np.array_equal(again[0][:, :2], logits[:, :2]) and not np.array_equal(again[0][:, 2], logits[:, 2])
    for found, wanted in zip(again[1:], (items, scores, earned), strict=True):
        assert np.array_equal(found[now], wanted[now]) and not np.array_equal(found[~now], wanted[~now])

    # each user's last event before the moment
    (tmp_path / "before").mkdir()
    last = np.array(
        [
            np.flatnonzero(log.time[low:high] < moment)[-1] + low
            for low, high in np.stack([log.user_offsets[:-1], log.user_offsets[1:]], 1)
        ]
    )
    other = make_engine(*overrides, log=changed(log, last), folder=tmp_path / "before")
    logits, items, scores, earned = asked(other, earlier, near, reward_table(engine, near))
    assert (logits[:, 1] != before[0][:, 1]).all()
    assert (items != before[1]).any() and (scores != before[2]).any(1).all() and (earned != before[3]).any()
