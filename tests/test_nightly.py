"""The nightly job of docs/daily.md as a loop: two days of a tiny log in CI, a week of MovieTweetings as a slow test."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
import zstandard
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from negfast.data.dataset import Dataset, date_of
from negfast.data.log import DAY
from negfast.prepare.samples import MOVIETWEETINGS
from negfast.runtime.run_folder import RunFolder
from negfast.train.run import train
from negfast.train.start import TrainOptions
from tests.tiny import SETTINGS, run_cli, write_log

DAYS = 6  # of MovieTweetings; each is scored by the day before it, so a week in all


def nightly(data: Path, init: Path, out: Path, settings: Mapping[str, object]) -> None:
    """`negfast train --preset nightly --init`, without the table of the test split."""
    overrides = tuple(f"{key}={value}" for key, value in settings.items())
    train(TrainOptions(preset="nightly", data=data, init=init, out=out, overrides=overrides), table=False)


def foresight(run: Path, data: Path, pairs: tuple[list[str], list[str]], folder: Path) -> np.ndarray:
    """What `negfast score RUN --data DATA` says of user-item pairs that came after the data's end; NaN: abstained."""
    asked, scored = folder / "asked.parquet", folder / "scored.parquet"
    parquet.write_table(pa.table({"user": pairs[0], "item": pairs[1]}), asked)
    run_cli("score", str(run), str(asked), "--data", str(data), "--out", str(scored))
    return parquet.read_table(scored)["score"].to_numpy(zero_copy_only=False)


def test_two_days_of_a_tiny_log(tiny_run: Path, tmp_path: Path) -> None:
    """`tiny_run` goes on from day to day over a log that grows by users and items of its own kind."""
    first = RunFolder(tiny_run).data
    end = int(Dataset.open(first).log.day.max())
    run, data = tiny_run, first
    rng = np.random.default_rng(5)
    settings = {k: v for k, v in SETTINGS.items() if not k.startswith(("model.", "align."))}
    settings |= {"sft.steps": 2, "sft.warmup": 1, "grpo.steps": 2, "grpo.warmup": 1}
    for number in (1, 2):
        lines = ["user,item,rating,time"]
        lines += [f"u{u},i{rng.integers(0, 90)},{rng.choice([1, 5])},{(end + number) * DAY + 60 * k}"
                  for k, u in enumerate([*range(40), f"new{number}"])]  # fmt: skip
        lines += [f"u{u},fresh{number},1,{(end + number) * DAY + 7000 + u}" for u in range(6)]
        (tmp_path / f"day{number}.csv").write_text("\n".join(lines) + "\n")
        titles = f"item,title,genre\nfresh{number},The grim story of day {number},grim\n"
        (tmp_path / f"items{number}.csv").write_text(titles)
        today = tmp_path / f"data{number}"
        command = ["prepare", str(tmp_path / f"day{number}.csv"), "--like", str(data)]
        run_cli(*command, "--items", str(tmp_path / f"items{number}.csv"), "--out", str(today))
        nightly(today, run, tmp_path / f"run{number}", settings)
        assert len(Dataset.open(today).items) == 90 + number
        run, data = tmp_path / f"run{number}", today
    out = tmp_path / "predicted.parquet"
    run_cli("predict", str(run), "--top", "5", "--out", str(out))
    users = set(parquet.read_table(out)["user"].to_pylist())
    assert {"unew1", "unew2", "u0"} <= users
    run_cli(
        "predict", str(tiny_run), "--data", str(data), "--top", "5", "--out", str(out)
    )  # frozen weights, today's log
    assert set(parquet.read_table(out)["user"].to_pylist()) == users
    described = json.loads((run / "run.json").read_text())
    assert described["init"] == str(tmp_path / "run1")
    ended = load_file(tmp_path / "run1" / "final" / "policy.safetensors")
    started = load_file(run / "checkpoints" / "initial" / "policy.safetensors")
    for name, weights in ended.items():  # all goes on but the verdict, which is fitted anew
        assert torch.equal(started[name], weights) != name.startswith("verdict."), name


def test_init_from_a_run_of_other_data_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    events, _ = write_log(tmp_path, seed=1)
    command = ["prepare", str(events), "--dislike", "rating<=2", "--horizon", "5", "--codebook", "16"]
    run_cli(*command, "--out", str(tmp_path / "other"))
    asked = ["train", "--preset", "nightly", "--init", str(tiny_run), "--data", str(tmp_path / "other")]
    assert "is not the data set that" in run_cli(*asked, "--out", str(tmp_path / "run"), code=2)
    assert not (tmp_path / "run" / "run.json").exists()
    own = ["train", "--preset", "nightly", "--init", str(tiny_run), "--data", str(RunFolder(tiny_run).data)]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    said = run_cli(*own, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), code=2)
    assert "has no place beside --init" in said


def ratings_by_day() -> Iterator[tuple[int, list[list[str]]]]:
    text = zstandard.ZstdDecompressor().decompress((MOVIETWEETINGS / "ratings.dat.zst").read_bytes()).decode()
    rows = sorted((line.split("::") for line in text.splitlines()), key=lambda row: int(row[3]))
    day = np.array([int(row[3]) // DAY for row in rows])
    for today in np.unique(day):
        yield int(today), [rows[i] for i in np.flatnonzero(day == today)]


@pytest.mark.slow
def test_a_week_of_movietweetings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every night: a day joins, training goes on, the next day's feedback is scored beforehand.

    Three ways to foresee a day: today's log and today's weights; today's log and the first night's weights ("frozen");
    the first night's log and weights ("stale").
    """
    days = list(ratings_by_day())
    start = days[-DAYS - 2][0]  # the last day is not whole
    history = [row for day, rows in days if day <= start for row in rows]
    (tmp_path / "ratings.dat").write_text("\n".join("::".join(row) for row in history) + "\n")
    movies = tmp_path / "movies.dat"
    movies.write_bytes(zstandard.ZstdDecompressor().decompress((MOVIETWEETINGS / "movies.dat.zst").read_bytes()))
    dates = ["--valid", date_of(start - 30), "--test", date_of(start - 14)]
    command = ["prepare", "--recipe", "movietweetings", str(tmp_path / "ratings.dat"), str(movies), *dates]
    run_cli(*command, "--encoder", "tfidf", "--out", str(tmp_path / "data0"))
    first, data = tmp_path / "run0", tmp_path / "data0"
    settings = ("sft.steps=60", "sft.validate_every=30")
    train(TrainOptions(preset="smoke", data=data, out=first, overrides=settings), table=False)
    run, figures, answered = first, [], []
    smaller = {"sft.steps": 40, "sft.histories": 32, "sft.validate_every": 20, "grpo.steps": 5,
               "grpo.histories": 4, "grpo.group": 8, "grpo.warmup": 1, "eval.beam": 50,
               "eval.valid_requests": 64}  # fmt: skip
    for number, (day, rows) in enumerate(days[-DAYS - 1 : -1], 1):
        assert day == start + number
        known = set(Dataset.open(data).user_ids)
        asked = [row for row in rows if row[0] in known]
        pairs = [row[0] for row in asked], [row[1] for row in asked]
        dislike = np.array([int(row[2]) <= 5 for row in asked])
        ways = (run, data), (first, data), (first, tmp_path / "data0")
        scores = np.stack([foresight(*way, pairs, tmp_path) for way in ways])
        answered.append(np.isfinite(scores).mean(1))
        common = np.isfinite(scores).all(0)  # an older log knows fewer items: the ways are compared on the same pairs
        figures.append([float(roc_auc_score(dislike[common], score[common])) for score in scores])
        fresh, frozen, stale = figures[-1]
        with capsys.disabled():
            print(f"{date_of(day)}: {len(asked)} pairs, AUC fresh {fresh:.3f}, frozen {frozen:.3f}, stale {stale:.3f}")
        today = tmp_path / f"ratings-{number}.dat"
        today.write_text("\n".join("::".join(row) for row in rows) + "\n")
        run_cli("prepare", str(today), "--like", str(data), "--out", str(tmp_path / f"data{number}"))
        data = tmp_path / f"data{number}"
        nightly(data, run, tmp_path / f"run{number}", smaller)
        run = tmp_path / f"run{number}"
    fresh, frozen, stale = np.mean(figures, axis=0)
    with capsys.disabled():
        print(f"mean: AUC fresh {fresh:.3f}, frozen {frozen:.3f}, stale {stale:.3f}; answered {np.mean(answered, 0)}")
    # A week is too short to gain from training anew; it must not cost more than the noise of some 2,500 pairs.
    assert fresh > 0.7 and fresh > frozen - 0.01 and fresh > stale - 0.01
    assert np.mean(answered, 0)[0] >= np.mean(answered, 0)[2] > 0.5
