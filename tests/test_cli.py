"""The command line: help without torch, options that arrive, exit codes, and prepare + inspect as a user runs them."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from negfast.cli import main
from negfast.data.dataset import Dataset
from negfast.errors import InputError, TrainingError
from negfast.runtime.run_folder import RunFolder

TRAIN: dict[str, object] = dict.fromkeys(("config", "preset", "data", "sample", "model", "init", "out", "refit")) | {
    "overrides": (),
    "whole_log": False,
}
COMMANDS = ["prepare", "inspect", "train", "eval", "report", "predict", "score", "user-profiles", "export", "doctor"]
DAY = 86_400


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture
def kuairand(tmp_path):
    """A log in KuaiRand's format: tab separated, hates and likes only, milliseconds, no titles."""
    rng = np.random.default_rng()
    columns = ["user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "play_time_ms", "label", "timestamp"]
    lines = []
    for day in range(14):
        for user in range(12):
            for video in rng.integers(1000, 1400, 4):
                time_ms = (1_649_376_000 + day * DAY) * 1000 + rng.integers(DAY * 1000)
                lines.append([100 + user, video, 20220408 + day, 1700, time_ms, 1, 9, rng.integers(2), "2022-04-10"])
    path = tmp_path / "events.tsv"
    path.write_text("\n".join("\t".join(map(str, line)) for line in [columns, *lines]) + "\n")
    return path


KUAIRAND_MAPPING = [
    *("--user-column", "user_id", "--item-column", "video_id", "--time-column", "time_ms", "--time-unit", "ms"),
    *("--dislike", "label==0", "--horizon", "3"),
]


def test_kuairand_by_mapping_alone(kuairand, tmp_path):
    result = invoke("prepare", kuairand, *KUAIRAND_MAPPING, "--out", tmp_path / "data")
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in kuairand.read_text().split("\n")[1:-1]]
    log = Dataset.open(tmp_path / "data").log
    assert len(log) == len(rows)
    assert sorted(log.time) == sorted(int(row[4]) // 1000 for row in rows)
    assert int((log.feedback == 2).sum()) == sum(row[7] == "0" for row in rows)
    assert "items: no text" in result.stdout
    assert "split: horizon 3 days" in result.stdout


def test_inspect_shows_the_data_set_and_finds_damage(kuairand, tmp_path):
    data = tmp_path / "data"
    assert invoke("prepare", kuairand, *KUAIRAND_MAPPING, "--out", data).exit_code == 0
    result = invoke("inspect", data)
    assert result.exit_code == 0, result.output
    manifest = Dataset.open(data).manifest
    assert f"{manifest['counts']['dislikes']:,} dislikes" in result.stdout
    assert "days          2022-04-08 to 2022-04-21" in result.stdout
    assert "collisions_before" in result.stdout
    assert "perplexity" in result.stdout
    for name in manifest["files"]:
        assert re.search(rf"^{re.escape(name)} .* ok$", result.stdout, re.MULTILINE)
    codes = data / "semantic_ids.safetensors"
    codes.write_bytes(codes.read_bytes()[:-1] + b"\x99")
    result = invoke("inspect", data)
    assert result.exit_code == 2
    assert result.stderr == f"negfast: {codes}: damaged: its SHA-256 is not that of manifest.json\n"


def test_inspect_shows_a_shard(kuairand, tmp_path):
    data = tmp_path / "data"
    assert invoke("prepare", kuairand, *KUAIRAND_MAPPING, "--out", data).exit_code == 0
    result = invoke("inspect", data / "events.nfs")
    assert result.exit_code == 0, result.output
    assert "672" in result.stdout  # events


def test_inspect_and_doctor_speak_json(tiny_run, tmp_path):
    data = RunFolder(tiny_run).data
    found = {}
    for path in (data, data / "events.nfs", data / "semantic_ids.safetensors", tiny_run, tiny_run / "final"):
        result = invoke("inspect", path, "--json")
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        assert facts["path"] == str(path)
        found[facts["kind"]] = facts
    assert list(found) == ["data set", "shard", "tensors", "run", "checkpoint"]
    manifest = json.loads((data / "manifest.json").read_text())
    assert found["data set"] == {"kind": "data set", "path": str(data), **manifest}
    assert found["tensors"]["tensors"]["codes"] == {"type": "uint16", "shape": [90, 3]}
    assert found["run"]["checkpoints"]["final"] == found["checkpoint"]["state"]
    doctor = json.loads(invoke("doctor", "--json").stdout)
    assert set(doctor) > {"negfast", "python", "torch", "memory", "CUDA", "C++ core"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    for flag in ("-h", "--help"):
        result = invoke(command, flag)
        assert result.exit_code == 0
        assert f"  negfast {command}" in result.stdout.split("Usage:")[1].split("\n", 1)[1]


def test_help_and_bad_input_do_not_wait_for_torch(tmp_path):
    code = (
        "import sys\n"
        "from negfast.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('heavy', {'torch', 'transformers', 'numba'} & set(sys.modules), end.code)\n"
        "if '--help' in sys.argv: print({'numpy', 'pyarrow'} & set(sys.modules))\n"
    )
    bad = ["prepare", str(tmp_path / "none.csv"), "--dislike", "a", "--out", str(tmp_path / "out")]
    for arguments, status in ((["--help"], 0), (["prepare", "--help"], 0), (["train", "-h"], 0), (bad, 2)):
        run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert f"heavy set() {status}" in run.stdout


def test_version_names_what_runs():
    import torch

    result = invoke("--version")
    assert result.exit_code == 0
    assert f"torch {torch.__version__}" in result.stdout
    for name in ("negfast", "triton", "CUDA"):
        assert name in result.stdout


def fake(monkeypatch, module, function, behaviour):
    """Puts a function in place of the one that the command imports."""
    monkeypatch.setattr(import_module(module), function, behaviour)


@pytest.mark.parametrize(
    ("line", "module", "function", "expected"),
    [
        (
            "train my.toml --preset smoke --data d --model m --init i --out o --set a.b=1 --set c.d=x",
            *("negfast.api", "train"),
            TRAIN
            | {"config": Path("my.toml"), "preset": "smoke", "data": Path("d"), "model": Path("m"), "init": Path("i")}
            | {"out": Path("o"), "overrides": ("a.b=1", "c.d=x")},
        ),
        ("train", "negfast.api", "train", TRAIN),
        (
            "train --refit r --whole-log --out o",
            *("negfast.api", "train"),
            TRAIN | {"refit": Path("r"), "out": Path("o"), "whole_log": True},
        ),
        (
            "eval r --split valid --data d --json --all-baselines --cost-dislike 5 --cost-like 0.5",
            *("negfast.api", "evaluate"),
            {
                0: Path("r"),
                "split": "valid",
                "data": Path("d"),
                "all_baselines": True,
                "cost_dislike": 5.0,
                "cost_like": 0.5,
            },
        ),
        ("report r --out p.html", "negfast.evaluate.report", "write_page", {0: Path("r"), 1: Path("p.html")}),
        (
            "user-profiles r --attribute genres --at 2013-08-01 --out f",
            *("negfast.serve.tables", "profile_users"),
            {0: Path("r"), 1: "genres", "data": None, "at": "2013-08-01", "part": None, "out": Path("f")},
        ),
        (
            "predict r --at 2013-08-01 --top 7 --out f",
            *("negfast.serve.tables", "predict_run"),
            {
                0: Path("r"),
                "data": None,
                "at": "2013-08-01",
                "part": None,
                "top": 7,
                "out": Path("f"),
                "users": None,
                "items": None,
                "not_items": None,
                "rank": "likely",
            },
        ),
        (
            "predict r --users u --items i --not-items n --rank taste --part 2/8 --out f",
            *("negfast.serve.tables", "predict_run"),
            {
                0: Path("r"),
                "data": None,
                "at": None,
                "part": "2/8",
                "top": 50,
                "out": Path("f"),
                "users": Path("u"),
                "items": Path("i"),
                "not_items": Path("n"),
                "rank": "taste",
            },
        ),
        (
            "score r c --data d --given shown --out f",
            *("negfast.serve.tables", "score_run"),
            {
                0: Path("r"),
                1: Path("c"),
                "data": Path("d"),
                "at": None,
                "part": None,
                "given": "shown",
                "out": Path("f"),
            },
        ),
        ("export r --out d", "negfast.serve.export", "export_run", {0: Path("r"), "out": Path("d")}),
    ],
)
def test_options_arrive(monkeypatch, line, module, function, expected):
    calls: list[dict[Any, Any]] = []

    def noted(*arguments: Any, **options: Any) -> dict[str, Any]:
        calls.append({**options, **dict[Any, Any](enumerate(arguments))})
        return {}

    fake(monkeypatch, module, function, noted)
    result = invoke(*line.split())
    assert result.exit_code == 0, result.output
    assert calls == [expected]


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (InputError("my.toml: unknown\nkey"), 2, "negfast: my.toml: unknown key\n"),
        (OSError(28, "No space left on device", "x"), 1, "negfast: [Errno 28] No space left on device: 'x'\n"),
        (TrainingError("loss is nan at step 7"), 1, "negfast: loss is nan at step 7\n"),
        (MemoryError(), 1, "negfast: MemoryError\n"),
    ],
)
def test_failures_are_one_line_and_a_code(monkeypatch, error, code, stderr):
    def fail(**_):
        raise error

    fake(monkeypatch, "negfast.api", "train", fail)
    result = invoke("train")
    assert (result.exit_code, result.stderr) == (code, stderr)


def test_ctrl_c_exits_130(monkeypatch):
    def interrupted(**_):
        print("saved at step 7; resume with ...", file=sys.stderr)
        raise KeyboardInterrupt

    fake(monkeypatch, "negfast.api", "train", interrupted)
    result = invoke("train")
    assert result.exit_code == 130
    assert result.stderr.strip() == "saved at step 7; resume with ..."


def test_a_bug_is_not_dressed_up(monkeypatch):
    def broken(**_):
        raise ZeroDivisionError

    fake(monkeypatch, "negfast.api", "train", broken)
    assert isinstance(invoke("train").exception, ZeroDivisionError)
