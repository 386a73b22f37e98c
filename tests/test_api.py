"""The Python API: light, typed, picklable, and the same answers as the commands."""

import inspect
import json
import multiprocessing
import pickle
import subprocess
import sys
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet
import pytest
import torch
from click.testing import CliRunner

import negfast
from negfast import api
from negfast.cli import main
from negfast.data.dataset import Dataset, date_of
from negfast.runtime.run_folder import RunFolder
from tests.tiny import SETTINGS, run_cli, write_log


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> negfast.Run:
    return negfast.load(tiny_run)


@pytest.fixture(scope="module")
def data(tiny_run: Path) -> Dataset:
    return Dataset.open(RunFolder(tiny_run).data)


@pytest.fixture(scope="module")
def pairs(data: Dataset) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(0)
    users = [data.user_ids[i] for i in rng.integers(0, data.log.n_users, 200)]
    return [*users, "nobody"], [data.items.ids[i] for i in rng.integers(0, data.log.n_items, 201)]


def test_import_is_light():
    code = (
        "import sys, negfast\n"
        "print(sorted({'torch', 'numpy', 'pyarrow', 'click'} & set(sys.modules)))\n"
        "assert callable(negfast.load) and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_names_are_there_before_and_after_packages_of_their_names_load():
    import_module("negfast.train.start")
    for name in ("prepare", "train", "evaluate"):
        function, package = getattr(api, name), getattr(negfast, name)
        assert inspect.signature(package) == inspect.signature(function) and callable(package)
        assert package is sys.modules[f"negfast.{name}"]
    assert set(negfast.__all__) <= set(dir(negfast))
    assert all(getattr(negfast, name) is not None for name in negfast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        _ = negfast.scores


@pytest.mark.parametrize(
    ("command", "function", "line", "only"),
    [
        ("prepare", api.prepare, ["x", "--out", "y"], {"as_json"}),
        ("train", api.train, [], {"gpus", "replay"}),
        ("eval", api.evaluate, ["x"], {"as_json"}),
    ],
)
def test_options_of_commands_and_functions_are_the_same(command, function, line, only):
    options = main.commands[command].make_context(command, line).params
    parameters = inspect.signature(function).parameters
    assert options.keys() - only == parameters.keys() - {"report"}
    for name, value in options.items():
        if name not in only | {"files", "out", "run"}:
            assert value == parameters[name].default, name


def test_score_is_the_commands(tiny_run, run, pairs, tmp_path, capfd):
    users, items = pairs
    scores = run.score(users, items)
    assert capfd.readouterr() == ("", "")  # nothing is said
    assert scores.probability.dtype == np.float64 and scores.abstain.dtype == bool
    assert scores.abstain.tolist() == [False] * 200 + [True] and np.isnan(scores.probability[-1])
    csv.write_csv(pa.table({"user": users, "item": items}), tmp_path / "pairs.csv")
    run_cli("score", str(tiny_run), str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "scored.parquet"))
    table = parquet.read_table(tmp_path / "scored.parquet")
    np.testing.assert_array_equal(table["score"].to_numpy(), scores.probability)
    assert table["abstain"].to_pylist() == scores.abstain.tolist()


def test_columns_may_be_any(run, pairs):
    users, items = pairs
    wanted = run.score(users, items).probability
    for make in (
        np.array,
        pa.array,
        lambda x: pa.array(x, pa.large_string()),
        lambda x: pa.chunked_array([x[:7], x[7:]]),
    ):
        np.testing.assert_array_equal(run.score(make(users), make(items)).probability, wanted)
    dictionary = pa.array(users, pa.large_string()).dictionary_encode()
    np.testing.assert_array_equal(run.score(dictionary, np.array(items, object)).probability, wanted)
    assert run.score([], []).probability.shape == (0,)
    assert run.score([None, users[0]], [items[0], float("nan")]).abstain.all()


def test_predict_and_profile_are_the_commands(tiny_run, run, data, tmp_path, capfd):
    users, items = data.user_ids[3:20], data.items.ids[5:60]
    table = run.predict([*users[::-1], "nobody"], top=7, items=items, not_items=items[:3])
    profile = run.profile(attribute="genre")
    assert capfd.readouterr() == ("", "")
    for name, column, ids in (("users", "user", users), ("items", "item", items), ("not", "item", items[:3])):
        csv.write_csv(pa.table({column: ids}), tmp_path / f"{name}.csv")
    files = [str(tmp_path / f"{name}.csv") for name in ("users", "items", "not")]
    out = ["--out", str(tmp_path / "x.parquet")]
    run_cli(
        "predict", str(tiny_run), "--top", "7", "--users", files[0], "--items", files[1], "--not-items", files[2], *out
    )
    assert parquet.read_table(tmp_path / "x.parquet").equals(table)
    run_cli("user-profiles", str(tiny_run), "--attribute", "genre", *out)
    assert parquet.read_table(tmp_path / "x.parquet").equals(profile)
    some = run.profile(users, attribute="genre")
    assert sorted(set(some["user"].to_pylist())) == sorted(users)
    assert run.profile([], attribute="genre").num_rows == run.predict(["nobody"]).num_rows == 0


def test_a_moment_may_be_a_string_a_datetime_or_numpys(run, data, pairs):
    day = date_of(int(data.log.day.max()) - 20)
    wanted = run.score(*pairs, at=f"{day}T12:30").probability
    assert not np.array_equal(wanted, run.score(*pairs).probability)
    when = datetime.fromisoformat(f"{day}T12:30")
    for at in (when, when.replace(tzinfo=UTC), np.datetime64(f"{day}T12:30"), np.datetime64(f"{day}T12:30:00", "ns")):
        np.testing.assert_array_equal(run.score(*pairs, at=at).probability, wanted)
        assert run.predict(data.user_ids[:3], at=at).equals(run.predict(data.user_ids[:3], at=day))
    for wrong in (np.datetime64("NaT"), "yesterday", 7):
        with pytest.raises(negfast.InputError, match="expected an ISO date or time"):
            run.score(*pairs, at=wrong)


def test_bad_input_is_an_input_error(tiny_run, run, data, tmp_path):
    user, item = data.user_ids[0], data.items.ids[0]
    for call, said in (
        (lambda: run.score([user, user], [item]), "users and items: found 2 and 1"),
        (lambda: run.score(user, [item]), "users: found 'u0', expected a column of ids"),
        (lambda: run.score([[user]], [item]), "expected a string or number"),
        (lambda: run.score([user, 7], [item, item]), "users: found no column of ids"),
        (lambda: run.score([user], [0.5]), "items, row 1: item 0.5 is no id"),
        (lambda: run.score([user], [item], given="seen"), "given: found 'seen', expected feedback or shown"),
        (lambda: run.score([user], [item], given="shown"), "its log has no exposures"),
        (lambda: run.predict([user], items=["nothing"]), "found no item to list"),
        (lambda: run.profile([user], attribute="colour"), "have genre"),
        (lambda: negfast.load(tmp_path), "found no run.json"),
        (lambda: negfast.load(tiny_run, tmp_path / "none"), "no such data set directory"),
        (lambda: negfast.evaluate(tiny_run, split="train"), "split: found 'train'"),
        (lambda: negfast.train(whole_log=True), "expected --refit RUN"),
        (lambda: negfast.train(refit=tiny_run, preset="smoke"), "--preset has no place beside --refit"),
        (lambda: negfast.prepare("x.csv", tmp_path / "x"), "Missing option '--dislike'"),
        (lambda: negfast.prepare("x", tmp_path / "x", like="y", horizon=5), "--horizon has no place beside --like"),
        (lambda: negfast.prepare("x", tmp_path / "x", dislike="r<3"), "x: no such file"),
    ):
        with pytest.raises(negfast.InputError, match=said):
            call()
    assert not list(tmp_path.iterdir())


def answer(pickled: bytes, users: list[str], items: list[str]) -> np.ndarray:
    """In a process of its own."""
    return pickle.loads(pickled).score(users, items).probability


def test_a_run_is_pickled_as_its_paths(run, pairs, tiny_run, monkeypatch):
    pickled = pickle.dumps(run)
    assert len(pickled) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(answer, (pickled, *pairs)), run.score(*pairs).probability)
    monkeypatch.chdir(tiny_run.parent)
    assert pickle.loads(pickle.dumps(api.Run(Path("run")))).path == tiny_run  # wherever the worker stands


def test_loading_changes_nothing_global(tiny_run):
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        negfast.load(tiny_run).score(["u1"], ["i1"])
        assert torch.get_num_threads() == threads + 1 and torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)


def test_from_a_log_to_scores(tmp_path, capsys):
    events, items = write_log(tmp_path)
    lines: list[str] = []
    found = negfast.prepare(
        events, tmp_path / "data", dislike="rating<=2", value_column="rating", items=items, item_text_column="title",
        item_attributes=["genre"], encoder="tfidf", codebook=16, horizon=5, report=lines.append,
    )  # fmt: skip
    assert found["counts"]["events"] == len(Dataset.open(tmp_path / "data").log) and any("split" in x for x in lines)
    short = SETTINGS | {"grpo.steps": 2, "sft.steps": 2, "align.steps": 1}
    overrides = [f"{key}={value}" for key, value in short.items()]
    run = negfast.train(preset="smoke", data=tmp_path / "data", out=tmp_path / "run", overrides=overrides)
    assert isinstance(run, negfast.Run) and not run.score(["u1"], ["i1"]).abstain[0]
    capsys.readouterr()
    measured = negfast.evaluate(run.path, split="valid", cost_dislike=5, cost_like=1)
    assert capsys.readouterr().out == ""
    costs = ["--cost-dislike", "5", "--cost-like", "1"]
    result = CliRunner().invoke(main, ["eval", str(run.path), "--split", "valid", "--json", *costs])
    assert json.loads(result.stdout) == measured and measured["costs"]["threshold"] == pytest.approx(1 / 6)
