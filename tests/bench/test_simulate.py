"""The simulator: propensities that are those of the draws, nothing shown twice, the same bits for a seed, any size."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from scipy import stats

from bench.simulate import FIRST_DAY, Simulation, SimulationSettings, Truth, exposure_policy, main, simulate
from negfast.data.dataset import Dataset
from negfast.data.log import DISLIKE, EXPOSED, LIKE
from negfast.errors import InputError
from tests.tiny import run_cli

SMALL = SimulationSettings(users=300, items=80, days=20, topics=7, seed=3)


@pytest.fixture(scope="module")
def small() -> Simulation:
    return simulate(SMALL)


def test_stored_propensities_are_the_policy(small: Simulation) -> None:
    log = small.log
    rows = np.random.default_rng(0).choice(len(log), 400, replace=False)
    for row in rows:
        user = int(log.user[row])
        policy = exposure_policy(small, user, int(log.day[row]) - FIRST_DAY, int(row - log.user_offsets[user]))
        assert policy.sum() == pytest.approx(1)
        assert small.propensity[row] == pytest.approx(policy[log.item[row]], rel=1e-6)


def test_items_are_shown_as_often_as_the_policy_says(small: Simulation) -> None:
    """Expected and found impressions of every item, over all users' histories (chi-square)."""
    log = small.log
    rows = np.random.default_rng(1).choice(len(log), 3000, replace=False)
    expected, variance = np.zeros((2, log.n_items))
    for row in rows:
        user = int(log.user[row])
        policy = exposure_policy(small, user, int(log.day[row]) - FIRST_DAY, int(row - log.user_offsets[user]))
        expected += policy
        variance += policy * (1 - policy)
    found = np.bincount(log.item[rows], minlength=log.n_items)
    z = (found - expected) / np.sqrt(variance)
    assert stats.chi2.sf((z**2).sum(), len(z)) > 1e-4
    flat = np.full(log.n_items, found.mean())
    assert stats.chi2.sf(((found - flat) ** 2 / flat).sum(), len(z)) < 1e-9  # the test can fail: not all alike


def test_nothing_is_shown_twice_and_histories_are_in_order(small: Simulation) -> None:
    log = small.log
    pairs = log.user.astype(np.int64) * log.n_items + log.item
    assert len(np.unique(pairs)) == len(pairs)
    same_user = np.diff(log.user) == 0
    assert (np.diff(log.time)[same_user] >= 0).all()
    assert (log.day - FIRST_DAY >= small.truth.release[log.item]).all()
    assert log.day.min() >= FIRST_DAY and log.day.max() < FIRST_DAY + SMALL.days
    assert len(small.propensity) == len(small.disliked) == len(log) == log.user_offsets[-1]


def test_feedback_follows_the_truth() -> None:
    simulation = simulate(replace(SMALL, users=3000, report_dislike=0.7, report_like=0.3, false_dislike=0.05))
    log = simulation.log
    p = simulation.truth.dislike_probability(log.user, log.item)
    for low, high in ((0, 0.05), (0.05, 0.2), (0.2, 1)):
        there = (p >= low) & (p < high)
        spread = np.sqrt((p * (1 - p))[there].sum())
        assert abs(simulation.disliked[there].sum() - p[there].sum()) < 4 * spread
    reported = [(log.feedback[simulation.disliked] == kind).mean() for kind in (DISLIKE, LIKE, EXPOSED)]
    assert reported == pytest.approx([0.7, 0, 0.3], abs=0.02)
    reported = [(log.feedback[~simulation.disliked] == kind).mean() for kind in (DISLIKE, LIKE, EXPOSED)]
    assert reported == pytest.approx([0.05, 0.3, 0.65], abs=0.01)


def test_the_dislike_rate_is_that_of_all_pairs_and_the_recommender_avoids_dislikes() -> None:
    simulation = simulate(replace(SMALL, users=1500, dislike_rate=0.3))
    truth = simulation.truth
    everything = truth.dislike_probability(np.arange(1500)[:, None], np.arange(SMALL.items)[None])
    assert everything.mean() == pytest.approx(0.3, abs=0.02)
    assert simulation.disliked.mean() < everything.mean() - 0.03


def test_suppression_turns_away_from_topics_that_were_disliked(small: Simulation) -> None:
    log = small.log
    without = replace(small, settings=replace(SMALL, suppression=0.0))
    row = int(np.flatnonzero(log.feedback == DISLIKE)[0])
    user, day = int(log.user[row]), int(log.day[row]) - FIRST_DAY
    before = row - int(log.user_offsets[user]) + 1
    topic = small.truth.topic == small.truth.topic[log.item[row]]
    masses = [exposure_policy(s, user, day, before)[topic].sum() for s in (small, without)]
    assert 0 < masses[0] < masses[1]


def same(a: Simulation, b: Simulation) -> bool:
    columns = [(s.log.item, s.log.feedback, s.log.time, s.propensity, s.disliked, s.weight) for s in (a, b)]
    return all(np.array_equal(x, y) for x, y in zip(*columns, strict=True))


def test_a_seed_gives_the_same_bits(small: Simulation) -> None:
    assert same(small, simulate(SMALL))
    assert not same(small, simulate(replace(SMALL, seed=4)))


@pytest.mark.parametrize("users,items,days,topics", [(1, 1, 1, 1), (1, 500, 9, 3), (700, 3, 5, 3), (5, 4, 90, 2)])
def test_any_size(users: int, items: int, days: int, topics: int) -> None:
    simulation = simulate(SimulationSettings(users, items, days, 0, 5.0, topics))
    log = simulation.log
    assert log.n_users == users and log.n_items == items == len(simulation.items)
    assert np.diff(log.user_offsets).max() <= items
    assert ((simulation.propensity > 0) & (simulation.propensity <= 1 + 1e-9)).all()
    pairs = log.user.astype(np.int64) * items + log.item
    assert len(np.unique(pairs)) == len(pairs)


def test_settings_that_make_no_sense() -> None:
    for changes, found in (({"users": 0}, "users: found 0"), ({"topics": 81}, "topics: found 81")):
        with pytest.raises(InputError, match=found):
            replace(SMALL, **changes)


def test_command_writes_what_prepare_reads(tmp_path: Path) -> None:
    out = tmp_path / "log"
    arguments = ["--users", "400", "--items", "150", "--days", "40", "--impressions", "3", "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    simulation = simulate(SimulationSettings(users=400, items=150, days=40, impressions=3))
    table = parquet.read_table(out / "events.parquet")
    assert table["propensity"].to_pylist() == simulation.propensity.tolist()
    assert json.loads((out / "simulation.json").read_text())["users"] == 400
    stored = load_file(out / "truth.safetensors")
    truth = Truth(**{name: stored[name] for name in vars(simulation.truth)})
    assert truth.dislike_probability(np.arange(9), np.arange(9)) == pytest.approx(
        simulation.truth.dislike_probability(np.arange(9), np.arange(9))
    )
    command = result.output.splitlines()[-1].split()
    assert command[:2] == ["negfast", "prepare"]
    run_cli(*command[1:], "--encoder", "tfidf", "--codebook", "16")
    log = Dataset.open(out / "data").log
    assert len(log) == len(simulation.log)
    assert np.bincount(log.feedback).tolist() == np.bincount(simulation.log.feedback).tolist()
    assert CliRunner().invoke(main, arguments).exit_code != 0  # is there already
