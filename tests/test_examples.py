"""The examples: an export answers as negfast does, where negfast is not."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import negfast
from negfast.data.dataset import Dataset
from negfast.runtime.run_folder import RunFolder
from negfast.sid.tokens import FEEDBACK
from tests.tiny import run_cli, train_arguments

EXAMPLES = Path(__file__).parents[1] / "examples"


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


def example(name: str, *arguments: object, stubs: Path = EXAMPLES, code: int = 0) -> list[dict[str, str]]:
    """The CSV that an example prints, or its last line of errors; it runs where negfast cannot be imported."""
    start = "import runpy, sys; sys.modules['negfast'] = None; sys.path.remove(sys.argv[1]); "  # transformers would
    start += "sys.path[:0] = sys.argv[2:4]; del sys.argv[:4]; "  # take the repository's kernels for a package it knows
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    paths = EXAMPLES.parent, stubs, EXAMPLES, EXAMPLES / name
    command = [sys.executable, "-P", "-c", start, *map(str, (*paths, *arguments))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return list(csv.DictReader(done.stdout.splitlines())) if code == 0 else [{"said": done.stderr.splitlines()[-1]}]


def write_events(path: Path, run: Path, users: list[str], later: list[tuple] = ()) -> Path:
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


def test_transformers_lists_what_negfast_predicts(run: Path, exported: Path, users: list[str], tmp_path: Path) -> None:
    events = write_events(tmp_path / "events.csv", run, users)
    found = example("transformers_constrained.py", exported, events, "--top", 40)
    expected = negfast.load(run).predict(users, top=40).to_pylist()
    assert len(expected) == 40 * len(users)
    for name in ("user", "rank", "item"):
        assert [row[name] for row in found] == [str(row[name]) for row in expected]
    scores = [float(row["score"]) for row in found]
    np.testing.assert_allclose(scores, [row["score"] for row in expected], rtol=0, atol=1e-5)
    assert max(scores) > 0.05  # so that the tolerance means something


def test_transformers_scores_what_negfast_scores(run: Path, exported: Path, users: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = Dataset.open(RunFolder(run).data).items.ids
    pairs = list(
        zip(rng.choice([*users, "nobody"], 400).tolist(), rng.choice([*items, "no"], 400).tolist(), strict=True)
    )
    with (candidates := tmp_path / "candidates.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item"), *pairs])
    events = write_events(tmp_path / "events.csv", run, users)
    found = example("transformers_constrained.py", exported, events, "--candidates", candidates)
    scores = negfast.load(run).score(*zip(*pairs, strict=True))
    assert [(row["user"], row["item"]) for row in found] == pairs
    assert [row["score"] == "" for row in found] == scores.abstain.tolist() and 10 < scores.abstain.sum() < 100
    got = [float(row["score"] or "nan") for row in found]
    np.testing.assert_allclose(got, scores.probability, rtol=0, atol=1e-5)
    assert np.nanstd(got) > 0.02


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
