"""A final refit: everything before T_test, nothing from there on, and nothing chosen again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from negfast.data.dataset import Dataset, date_of
from negfast.data.log import DISLIKE
from negfast.data.split import all_requests
from negfast.evaluate import baselines
from negfast.evaluate.eval import baselines_of
from negfast.evaluate.sets import engine_set
from negfast.runtime import distributed
from negfast.runtime.checkpoint import read_state
from negfast.runtime.run_folder import RunFolder
from negfast.train.run import refit
from tests import tiny
from tests.tiny import run_cli


@pytest.fixture(scope="module")
def refitted(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    out = tmp_path_factory.mktemp("refit") / "run"
    said = run_cli("train", "--refit", str(tiny_run), "--out", str(out))
    return RunFolder(out), said


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_repeats_what_was_chosen_on_valid(tiny_run, refitted):
    run, said = refitted
    source = RunFolder(tiny_run)
    assert run.config == source.config
    steps = {stage: read_state(source.checkpoints / stage)["step"] for stage in ("align", "sft", "grpo")}
    assert {stage: chosen.step for stage, chosen in run.refit.stages.items()} == steps
    done = [line["stage"] for line in lines(run.path / "metrics.jsonl")]
    assert {stage: done.count(stage) for stage in steps} == steps
    rates = {(line["stage"], line["step"]): line["lr"] for line in lines(tiny_run / "metrics.jsonl")}
    assert all(line["lr"] == rates[line["stage"], line["step"]] for line in lines(run.path / "metrics.jsonl"))
    assert not [line for line in lines(run.path / "events.jsonl") if line["event"] in ("valid", "chosen")]
    engines = [folder.finished_engine(None) for folder in (source, run)]
    scales = [float(engine.policy.block.scale) for engine in engines]
    assert scales[0] == scales[1] == run.refit.stages["grpo"].scale
    slopes = [folder.calibration.slope for folder in (source, run)]
    assert slopes[0] == pytest.approx(slopes[1])
    assert run.calibration == run.refit.calibration
    states = [(folder / "policy.safetensors").read_bytes() for folder in (source.final, run.final)]
    assert states[0] != states[1]
    assert "boosted" in said and "grpo" in said and run.report.exists()  # the table on test


def test_it_is_trained_on_every_future_that_ends_before_test(tiny_run, refitted):
    source, engine = (folder.finished_engine(None) for folder in (RunFolder(tiny_run), refitted[0]))
    log, data = engine.log, engine.data
    assert engine.fit_until == data.test_day and source.fit_until == data.valid_day
    found = all_requests(log, data.horizon)
    wanted = [(u, d) for u, d in zip(found.user, found.day, strict=True) if d + data.horizon < data.test_day]
    requests = engine.train_requests
    assert list(zip(requests.user, requests.day, strict=True)) == wanted
    assert len(source.train_requests) < len(wanted)
    early = log.day < data.test_day
    assert engine.features.prior_rate == pytest.approx((log.feedback[early] == DISLIKE).mean())


def test_nothing_from_the_test_day_on_is_learned(tiny_run, tiny_data, refitted, tmp_path):
    """The same source over a log that tells another story from T_test on gives the same weights."""
    data = Dataset.open(tiny_data)
    events, items = tiny.write_log(tmp_path)
    rng = np.random.default_rng()
    told = ["user,item,rating,time"]
    changed = 0
    for line in events.read_text().splitlines()[1:]:
        user, item, rating, time = line.split(",")
        if int(time) // 86_400 >= data.test_day:
            item, rating = f"i{rng.integers(tiny.ITEMS)}", str(6 - int(rating))
            changed += 1
        told.append(f"{user},{item},{rating},{time}")
    assert changed > 100
    events.write_text("\n".join(told) + "\n")
    dates = ("--valid", date_of(data.valid_day), "--test", date_of(data.test_day))
    other = tiny.prepare_log(tmp_path, events, items, *dates)
    copied = tmp_path / "source"
    shutil.copytree(tiny_run, copied)
    told_of_it = {"data": str(other), "fingerprint": Dataset.open(other).fingerprint}
    description = RunFolder(tiny_run).read() | told_of_it
    (copied / "run.json").write_text(json.dumps(description))
    refit(RunFolder(copied), tmp_path / "refit", table=False)
    again = RunFolder(tmp_path / "refit")
    assert again.refit is not None and again.refit.stages == refitted[0].refit.stages
    weights = [(folder.final / "policy.safetensors").read_bytes() for folder in (refitted[0], again)]
    assert weights[0] == weights[1]


def test_it_cannot_be_asked_about_what_it_was_trained_on(refitted):
    run = refitted[0]
    until = date_of(Dataset.open(run.data).test_day)
    said = run_cli("eval", str(run.path), "--split", "valid", code=2)
    assert f"learned from events before {until}, so valid" in said
    rows = {row["name"]: row for row in json.loads(run_cli("eval", str(run.path), "--json").splitlines()[-1])["rows"]}
    share = rows["boosted"]["filter_at_threshold_share"]["mean"]  # chosen by a fit before valid
    assert 0 < share < 1 and "filter_at_threshold_share" in rows["verdict"]


def test_no_run_that_chooses_on_valid_starts_from_it(tiny_data, refitted, tmp_path):
    run = refitted[0]
    said = run_cli(*tiny.train_arguments(tiny_data, tmp_path / "run", run.path), code=2)
    data = Dataset.open(tiny_data)
    until, start = date_of(data.test_day), date_of(data.valid_day)
    assert f"learned from events before {until}, expected none from {start} on" in said
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_asked_about_days_that_it_learned_from_in_other_data(tiny_run, tiny_data, tmp_path):
    """The same log, split earlier: what is test there was training here."""
    data = Dataset.open(tiny_data)
    events = tmp_path / "event.csv"
    events.write_text(f"user,item,rating,time\nnew,i0,1,{int(data.log.time.max()) + 1}\n")
    early = [date_of(data.valid_day - days) for days in (14, 6)]
    command = ["prepare", str(events), "--like", str(tiny_data), "--valid", early[0], "--test", early[1]]
    run_cli(*command, "--out", str(tmp_path / "early"))
    said = run_cli("eval", str(tiny_run), "--data", str(tmp_path / "early"), code=2)
    assert (
        f"learned from events before {date_of(data.valid_day)}, so test, from {early[1]} on, cannot measure it" in said
    )


def test_settings_that_more_ranks_cannot_have_are_refused(tiny_run, tmp_path, monkeypatch):
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    settings = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(settings.replace('loss = "dr_grpo"', 'loss = "dapo"'))
    monkeypatch.setattr(distributed, "planned_size", lambda: 2)
    said = run_cli("train", "--refit", str(copy), "--out", str(tmp_path / "again"), code=2)
    assert "grpo.loss: found dapo with 2 micro-batches" in said and not (tmp_path / "again").exists()


def test_the_same_call_finds_it_and_others_are_refused(tiny_run, refitted, tmp_path):
    run = refitted[0]
    before = (run.path / "events.jsonl").read_bytes()
    run_cli("train", "--refit", str(tiny_run), "--out", str(run.path))
    assert (run.path / "events.jsonl").read_bytes() == before
    assert "is a refit itself" in run_cli("train", "--refit", str(run.path), "--out", str(tmp_path / "x"), code=2)
    assert "found another run" in run_cli("train", "--refit", str(tiny_run), "--out", str(tiny_run), code=2)
    assert "exists and is no run" in run_cli("train", "--refit", str(tiny_run), "--out", str(tmp_path), code=2)
    unfinished = run_cli("train", "--refit", str(tmp_path / "none"), "--out", str(tmp_path / "x"), code=2)
    assert "expected a run directory" in unfinished
    assert "--preset has no place" in run_cli("train", "--refit", str(tiny_run), "--preset", "smoke", code=2)


def test_on_the_whole_log_it_leaves_nothing_to_measure_it_on(tiny_run, tmp_path):
    said = run_cli("train", "--refit", str(tiny_run), "--whole-log", "--out", str(tmp_path / "run"))
    run = RunFolder(tmp_path / "run")
    log = Dataset.open(run.data).log
    engine = run.finished_engine(None)
    assert run.refit is not None and run.refit.until == run.learned_until == engine.fit_until == int(log.day.max()) + 1
    everything = all_requests(log, engine.data.horizon)
    assert len(engine.train_requests) == (everything.day + engine.data.horizon < engine.fit_until).sum()
    assert "learned from the whole log" in said and not run.report.exists()
    assert "so test, from" in run_cli("eval", str(run.path), code=2)
    again = run_cli("train", "--refit", str(tiny_run), "--out", str(run.path), code=2)
    assert f"found a refit on events before {date_of(run.refit.until)}" in again
    assert "--whole-log: expected --refit RUN" in run_cli("train", "--whole-log", code=2)


def test_it_is_not_written_into_a_data_set(tiny_data, tiny_run):
    assert "lies in the data set" in run_cli(
        "train", "--refit", str(tiny_run), "--out", str(tiny_data / "refit"), code=2
    )


def test_its_baselines_are_made_once_with_thresholds_of_a_fit_before_valid(tiny_run, refitted, monkeypatch):
    engines = [folder.finished_engine(None) for folder in (RunFolder(tiny_run), refitted[0])]
    sets = {name: engine_set(engines[0], name) for name in ("valid", "test")}
    calls: list[str] = []

    def counted(name: str, make: Callable) -> Callable:
        def made(*given: Any) -> Any:
            calls.append(name)
            return make(*given)

        return made

    for name in ("ranking_predictions", "knn_predictions", "rate_predictions"):
        monkeypatch.setattr(baselines, name, counted(name, getattr(baselines, name)))
    (before, _), (again, _) = (baselines_of(engine, sets, "test", trained=False) for engine in engines)
    assert calls == ["ranking_predictions", "knn_predictions", "rate_predictions"] * 2  # once for each run
    assert [made.filter_threshold for made in again.values()] == [made.filter_threshold for made in before.values()]
    scores = [of_run["boosted"].filter_score for of_run in (before, again)]
    assert scores[0] is not None and scores[1] is not None and (scores[0] != scores[1]).any()
