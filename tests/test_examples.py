"""The examples: an export answers as negfast does, where negfast is not."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.numpy import load_file

import negfast
from negfast.data.dataset import Dataset
from negfast.data.log import DAY
from negfast.runtime.run_folder import RunFolder
from negfast.sid.tokens import FEEDBACK
from tests.tiny import run_cli, train_arguments

EXAMPLES, STUBS = Path(__file__).parents[1] / "examples", Path(__file__).parent / "stubs"


@pytest.fixture(scope="module", params=["day", "event"])
def run(request: pytest.FixtureRequest, tiny_run: Path, tiny_data: Path, tmp_path_factory) -> Path:
    """Finished runs of both contexts."""
    if request.param == "day":
        return tiny_run
    out = tmp_path_factory.mktemp("event") / "run"
    run_cli(*train_arguments(tiny_data, out, history__context="event", grpo__steps=1))
    return out


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.parent / "exported"
    negfast.export(run, out)
    return out


@pytest.fixture(scope="module")
def users(run: Path) -> list[str]:
    return Dataset.open(RunFolder(run).data).user_ids[5:17]


def example(name: str, *arguments: object) -> list[dict[str, str]]:
    """The CSV that an example prints; it runs where negfast cannot be imported."""
    start = "import runpy, sys; sys.modules['negfast'] = None; sys.path.remove(sys.argv[1]); "  # transformers would
    start += "sys.path[:0] = sys.argv[2:4]; del sys.argv[:4]; "  # take the repository's kernels for a package it knows
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    paths = EXAMPLES.parent, STUBS, EXAMPLES, EXAMPLES / name
    command = [sys.executable, "-P", "-c", start, *map(str, (*paths, *arguments))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(done.stdout.splitlines()))


def write_events(path: Path, run: Path, users: list[str], later: Sequence[tuple] = ()) -> Path:
    """Users' events as a data set has them, and ``later`` ones."""
    data = Dataset.open(RunFolder(run).data)
    log, rows = data.log, []
    for user in users:
        row = data.user_ids.index(user)
        for k in range(log.user_offsets[row], log.user_offsets[row + 1]):
            value = "" if log.value is None else float(log.value[k])
            rows.append((user, data.items.ids[log.item[k]], int(log.time[k]), FEEDBACK[log.feedback[k]], value))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item", "time", "feedback", "value"), *rows, *later])
    return path


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item"), *pairs])
    return path


@pytest.mark.parametrize("name", ["transformers_constrained.py", "vllm_constrained.py"])
def test_examples_list_what_negfast_predicts(
    name: str, run: Path, exported: Path, users: list[str], tmp_path: Path
) -> None:
    """vLLM's interface is a stub."""
    events = write_events(tmp_path / "events.csv", run, users)
    found = example(name, exported, events, "--top", 40)
    expected = negfast.load(run).predict(users, top=40).to_pylist()
    assert len(expected) == 40 * len(users)
    for column in ("user", "rank", "item"):
        assert [row[column] for row in found] == [str(row[column]) for row in expected]
    scores = [float(row["score"]) for row in found]
    np.testing.assert_allclose(scores, [row["score"] for row in expected], rtol=0, atol=1e-5)
    assert max(scores) > 0.05  # so that the tolerance means something


def test_transformers_scores_what_negfast_scores(run: Path, exported: Path, users: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = Dataset.open(RunFolder(run).data).items.ids
    pairs = list(
        zip(rng.choice([*users, "nobody"], 400).tolist(), rng.choice([*items, "no"], 400).tolist(), strict=True)
    )
    candidates = write_pairs(tmp_path / "candidates.csv", pairs)
    events = write_events(tmp_path / "events.csv", run, users)
    found = example("transformers_constrained.py", exported, events, "--candidates", candidates)
    scores = negfast.load(run).score([user for user, _ in pairs], [item for _, item in pairs])
    assert [(row["user"], row["item"]) for row in found] == pairs
    assert [row["score"] == "" for row in found] == scores.abstain.tolist() and 10 < scores.abstain.sum() < 100
    got = [float(row["score"] or "nan") for row in found]
    np.testing.assert_allclose(got, scores.probability, rtol=0, atol=1e-5)
    assert np.nanstd(got) > 0.02


def test_new_users_and_later_events_count_as_in_a_live_run(
    run: Path, exported: Path, users: list[str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    data, live = Dataset.open(RunFolder(run).data), negfast.load(run).live()
    end = (int(data.log.time.max()) // DAY + 1) * DAY
    later = []
    for step in range(40):
        user, item = str(rng.choice([users[0], "new", "other"])), str(rng.choice(data.items.ids))
        feedback = str(rng.choice(FEEDBACK[:4], p=[0.1, 0.4, 0.4, 0.1]))
        value = None if feedback in ("shown", "withdrawn") else float(rng.integers(1, 6))
        later.append((user, item, end + step * 9_000, feedback, value))
        live.add(*later[-1][:4], value=value)
    at = end + 40 * 9_000 + 500
    pairs = [(user, item) for user in (users[0], "new", "other", users[1]) for item in data.items.ids]
    events = write_events(tmp_path / "events.csv", run, users[:2], later)
    candidates = write_pairs(tmp_path / "candidates.csv", pairs)
    found = example("transformers_constrained.py", exported, events, "--candidates", candidates, "--at", at)
    scores = live.score([user for user, _ in pairs], [item for _, item in pairs], datetime.fromtimestamp(at, UTC))
    np.testing.assert_allclose([float(row["score"]) for row in found], scores.probability, rtol=0, atol=1e-5)


def test_walks_draw_unseen_items_by_the_community_prior(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal logits an item is drawn in proportion to its decayed dislikes and eps, counted from the log; and
    whatever the logits are, what is drawn is an item that was not seen."""
    for path in (EXAMPLES, STUBS):
        monkeypatch.syspath_prepend(str(path))
    from vllm import SamplingParams
    from vllm_constrained import OnTrie

    data, about = Dataset.open(RunFolder(run).data), json.loads((exported / "negfast.json").read_text())
    seen = list(range(0, 60, 2))
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(exported)))
    on_trie = OnTrie(config, torch.device("cpu"), False)
    assert on_trie.new_req_logits_processor(SamplingParams(3, 1.0, 0)) is None
    walk = on_trie.new_req_logits_processor(SamplingParams(3, 1.0, 0, {"seen": seen, "completion": []}))
    assert walk is not None
    size = about["base"] + 400
    age = data.log.day.max() - data.log.day
    disliked = np.where(data.log.feedback == 2, 0.5 ** (age / about["prior"]["half_life_days"]), 0)
    mass = np.bincount(data.log.item, disliked, len(data.items)) + about["prior"]["eps"]
    mass[seen] = 0
    tokens = load_file(exported / "trie.safetensors")["tokens"]
    rng, found = np.random.default_rng(0), np.ones(len(mass))
    for item, of_item in enumerate(tokens.tolist()):
        for level, token in enumerate(of_item):
            found[item] *= walk(of_item[:level], torch.zeros(size)).softmax(0)[token] if found[item] else 0
    np.testing.assert_allclose(found, mass / mass.sum(), rtol=1e-5)
    items = {tuple(of_item): item for item, of_item in enumerate(tokens.tolist())}
    for _ in range(200):
        drawn: list[int] = []
        while len(drawn) < about["levels"]:
            logits = walk(drawn, torch.from_numpy(rng.normal(size=size) * 30)).numpy()
            drawn.append(int(rng.choice(np.flatnonzero(np.isfinite(logits)))))
        assert items[tuple(drawn)] not in seen


@pytest.mark.parametrize("change", [{"format": 3}, {"layout": "codes"}, {"layout": None}])
def test_another_layout_is_refused(change: dict, exported: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from exported import Export

    about = json.loads((exported / "negfast.json").read_text()) | change
    (tmp_path / "negfast.json").write_text(json.dumps(about))
    found = re.escape(
        f"found an export of format and layout {(about['format'], about['layout'])}, expected (6, 'events')"
    )
    with pytest.raises(SystemExit, match=found):
        Export(tmp_path)


def test_events_that_do_not_fit_an_export_are_refused(
    run: Path, exported: Path, users: list[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from exported import Export

    events = write_events(tmp_path / "events.csv", run, users[:1])
    whole = events.read_text().splitlines(keepends=True)
    for lines, said in (
        (whole[:-1], f"events of {users[0]} in the log: found 47 judged items, expected 48"),
        (whole[:1], f"events of {users[0]} in the log: found 0 judged items, expected 48"),
        (["user,item,feedback,value\n"], "events.csv: found no column 'time', expected user, item, time, feedback"),
        ([*whole, "new,i999,5,like,\n"], "events.csv:50: found item 'i999', expected one of items.json"),
        ([*whole, "new,i1,5,love,\n"], "events.csv:50: found feedback 'love', expected shown, like"),
    ):
        events.write_text("".join(lines))
        export = Export(exported)
        with pytest.raises(SystemExit, match=said):
            export.read_events(events)
            export.known({users[0]}, export.moment(None, of_lists=False))
    with pytest.raises(SystemExit, match="--at: found 1600000000, expected 1606089600 or later"):
        export.moment(1_600_000_000, of_lists=True)
    with pytest.raises(SystemExit, match="--given shown: the run has no such calibration"):
        export.probability(np.zeros(1), "shown")


def test_ray_scores_what_the_command_scores(tiny_run: Path, tmp_path: Path) -> None:
    """On two local workers; the development environment has Ray."""
    data = Dataset.open(RunFolder(tiny_run).data)
    rng = np.random.default_rng(0)
    pairs = {"user": rng.choice([*data.user_ids, "nobody"], 300), "item": rng.choice(data.items.ids, 300)}
    candidates = tmp_path / "pairs.parquet"
    parquet.write_table(pa.table(pairs | {"n": np.arange(300)}), candidates)
    command = [sys.executable, str(EXAMPLES / "ray_score.py"), str(tiny_run), str(candidates), str(tmp_path / "scored")]
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run_cli("score", str(tiny_run), str(candidates), "--out", str(tmp_path / "whole.parquet"))
    found, whole = parquet.read_table(tmp_path / "scored").sort_by("n"), parquet.read_table(tmp_path / "whole.parquet")
    assert found.drop(["score"]).equals(whole.drop(["score"]))
    np.testing.assert_allclose(found["score"].to_numpy(), whole["score"].to_numpy(), rtol=1e-5)
