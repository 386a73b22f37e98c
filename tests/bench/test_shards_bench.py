"""The storage benchmark on a handful of users: every system's output is verified by it, and the JSON has its shape."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bench.sequences import make_sequences
from bench.shards import Bench, measure, negfast_contender, run
from negfast.data.log import DAY
from negfast.data.shards import write_shard

FIGURES = {"bytes_per_event", "write_mev_s", "sequential_mev_s", "random_users_s", "packed_mtok_s"}


def test_measures_every_installed_system(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = run(users=40, repeats=1, out=tmp_path / "shards.json")
    assert json.loads((tmp_path / "shards.json").read_text()) == result
    systems = {row["system"] for row in result["rows"]}
    assert {"negfast", "numpy-planes-zstd", "parquet-zstd", "megatron-memmap"} <= systems
    assert all(row[figure] > 0 for row in result["rows"] for figure in FIGURES)
    assert all(row["histories_mpos_s"] > 0 for row in result["rows"] if row["system"] == "negfast")
    assert {
        (row["case"]["cores"], row["case"]["resolution"]) for row in result["rows"] if row["system"] == "negfast"
    } == {(cores, resolution) for cores in (1, 2) for resolution in ("seconds", "days")}
    assert {(r["peer"], r["figure"]) for r in result["ratios"]} == {
        (s, f) for s in systems - {"negfast"} for f in FIGURES
    }
    assert [path.name for path in tmp_path.iterdir()] == ["shards.json"]
    assert capsys.readouterr().out.count("Mtok/s") == len(result["rows"])


def test_wrong_output_is_not_measured(tmp_path, monkeypatch):
    bench = Bench(make_sequences(30), tmp_path)
    monkeypatch.setattr("bench.shards.write_shard", _write_with_a_wrong_item)
    with pytest.raises(AssertionError, match="something else than was written"):
        measure(bench, [negfast_contender(bench, 1, "seconds", 1)], repeats=1)


def _write_with_a_wrong_item(path, log, time_unit, threads):
    item = log.item.copy()
    item[len(item) // 2] ^= 1
    write_shard(path, replace(log, item=item), time_unit, threads)


def test_sequences_follow_their_description():
    data = make_sequences(3000)
    log = data.log
    assert log.time.dtype == np.int64
    assert len(np.unique(data.codes, axis=0)) == len(data.codes)
    assert np.diff(log.user_offsets).mean() == pytest.approx(149, rel=0.06)
    assert (log.feedback == 2).mean() == pytest.approx(0.03, abs=0.002)
    assert all(
        (np.diff(log.time[a:b]) >= 0).all() for a, b in zip(log.user_offsets, log.user_offsets[1:], strict=False)
    )
    assert log.time.max() < 61 * DAY
    again = make_sequences(3000)
    assert all((a == b).all() for a, b in ((log.item, again.log.item), (log.time, again.log.time)))
    assert (make_sequences(3000, seed=1).log.item[:100] != log.item[:100]).any()
