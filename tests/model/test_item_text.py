"""Item texts in the stream: what starts at zero, follows the items, and is kept by a run."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from negfast.config import History
from negfast.data.dataset import Dataset
from negfast.data.features import text_vectors
from negfast.data.items import ItemTable
from negfast.model.histories import item_text, text_width
from negfast.runtime.run_folder import RunFolder
from tests.tiny import run_cli, train_arguments

WITH_TEXT = History(text=True)


def test_texts_that_start_at_zero_change_no_bit(tiny_data, tmp_path):
    rows = []
    for text in ("false", "true"):
        run = tmp_path / text
        none: dict[str, Any] = {f"{stage}__steps": 0 for stage in ("align", "sft", "grpo")}
        run_cli(*train_arguments(tiny_data, run, history__text=text, **none))
        engine = RunFolder(run).finished_engine(None)
        torch.nn.init.constant_(engine.policy.block.head.weight, 0.1)
        users, moments = np.arange(5, dtype=np.int32), np.full(5, int(engine.log.time.max()))
        histories = engine.histories.build(users, moments)
        assert (histories.item_text is None) == (text == "false")
        rows.append(histories.start(engine.policy, "next-dislike"))
    assert torch.equal(*rows)


def test_a_run_with_text_trains_and_scores_the_same_again_and_exports_nothing(tiny_data, tmp_path):
    run = tmp_path / "run"
    run_cli(*train_arguments(tiny_data, run, history__text="true", train__dtype="bfloat16"))
    policy = RunFolder(run).finished_engine(None).policy
    assert policy.text_projection is not None and policy.text_projection.abs().max() > 0
    (tmp_path / "pairs.csv").write_text("user,item\nu1,i2\nu3,i5\n")
    scored = []
    for name in ("a.csv", "b.csv"):
        run_cli("score", str(run), str(tmp_path / "pairs.csv"), "--out", str(tmp_path / name))
        scored.append((tmp_path / name).read_text())
    assert scored[0] == scored[1]
    run_cli("predict", str(run), "--top", "3", "--out", str(tmp_path / "lists.csv"))
    said = run_cli("export", str(run), "--out", str(tmp_path / "out"), code=2)
    assert "history.text=true" in said and not (tmp_path / "out").exists()
    said = run_cli(*train_arguments(tiny_data, tmp_path / "next", run), code=2)
    assert "was trained with history.text=true, expected false" in said


def test_later_items_leave_the_vectors_of_the_others_as_they_are(tiny_data):
    data = Dataset.open(tiny_data)
    before, rng = item_text(data), np.random.default_rng(0)
    more = np.concatenate([data.embedding, rng.normal(size=(7, data.embedding.shape[1])).astype(np.float32)])
    ids = [*data.items.ids, *(f"new{i}" for i in range(7))]
    grown = replace(data.items, ids=ids, vectors=more, original=len(before))
    assert np.allclose(text_vectors(grown)[: len(before)], before, atol=1e-3)
    assert np.linalg.norm(before.astype(np.float64), axis=1) == pytest.approx(1, abs=2e-3)


def test_the_sign_of_an_axis_does_not_depend_on_the_library(monkeypatch):
    items = ItemTable([""] * 50, [""] * 50, vectors=np.random.default_rng(1).normal(size=(50, 9)).astype(np.float32))
    wanted, eigh = text_vectors(items), np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    assert np.abs(wanted).max() > 0 and np.array_equal(text_vectors(items), wanted)


def test_what_was_counted_of_events_is_no_text(tiny_data):
    data = Dataset.open(tiny_data)
    assert text_width(data, WITH_TEXT) == item_text(data).shape[1] and text_width(data, History()) == 0
    report = data.manifest["semantic_ids"]["report"]
    report["blocks"] = {"co-occurrence": data.embedding.shape[1]}
    assert text_width(data, WITH_TEXT) == 0
