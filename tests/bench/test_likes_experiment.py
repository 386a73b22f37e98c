"""Likes in the prompt: what is shown changes what is answered, and nothing else does."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from bench.experiments.likes import SHOWN, likes_so_far, main
from negfast.data.log import LIKE
from negfast.evaluate.sets import evaluation_set
from negfast.runtime.run_folder import RunFolder


def test_rows_by_likes_shown_and_by_history(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "likes.json"
    result = CliRunner().invoke(main, [str(tiny_run), "--resamples", "10", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(out.read_text())
    rows = {row["likes_shown"]: row for row in found["rows"]}
    assert set(rows) == {*SHOWN, found["trained_with"]}
    assert {value["mean"] for value in rows[0]["minus_none"].values()} == {0.0}
    assert rows[100]["nll"] == rows[200]["nll"]  # nobody has so many
    assert rows[20]["minus_none"]["nll"]["mean"] != 0
    engine = RunFolder(tiny_run).finished_engine(None)
    valid = evaluation_set(engine.log, engine.split, "valid")
    assert sum(part["requests"] for part in found["by_history"]) == len(valid.requests)
    assert sum(part["events"] for part in found["by_history"]) == len(valid.filter_user)
    counts = likes_so_far(engine, valid.requests.user[:9], valid.requests.day[:9])
    log = engine.log
    for user, day, count in zip(valid.requests.user, valid.requests.day, counts, strict=False):
        assert count == np.sum((log.user == user) & (log.day <= day) & (log.feedback == LIKE))
