"""Synthetic logs: the same bits for a seed, the sizes asked for; and the benchmark's rows."""

import numpy as np
import pyarrow.parquet as parquet
import pytest

from bench import scale, synthetic_log
from bench.synthetic_log import write_log
from negfast.errors import InputError


def test_a_log_has_its_sizes_and_depends_on_the_seed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_log, "FILE_EVENTS", 4000)
    folders = [write_log(tmp_path / str(i), 10_000, items=500, seed=seed) for i, seed in enumerate((1, 1, 2))]
    a, b, c = (parquet.read_table(folder) for folder in folders)
    assert len(list(folders[0].iterdir())) == 3
    assert a.equals(b) and not a.equals(c)
    user, item, rating, time = (a[name].to_numpy() for name in ("user", "item", "rating", "time"))
    assert len(a) == 10_000 and user.max() < 500 and item.max() < 500 and set(rating.tolist()) == {1, 2, 3, 4, 5}
    assert (np.diff(time) >= 0).all() and time[-1] - time[0] < 180 * 86_400
    counts = np.sort(np.bincount(item, minlength=500))[::-1]
    share = 1 / np.arange(1, 501)
    np.testing.assert_allclose(counts[:5] / len(a), share[:5] / share.sum(), rtol=0.25)  # Zipf
    users = np.sort(np.bincount(user, minlength=500))[::-1]
    assert 0.4 < users[:50].sum() / len(a) < 0.5  # a tenth of the users


def test_the_benchmark_has_a_row_for_each_system(tmp_path):
    result = scale.run("30000", memory="2GB", runs=1, folder=tmp_path)
    rows = {row["system"]: row for row in result["rows"]}
    assert {"negfast", "negfast events", "duckdb"} <= set(rows) and not list(tmp_path.iterdir())
    for row in rows.values():
        assert row["events"] == 30_000 and row["wall_s"] > 0 and row["peak_mib"] > 40 and row["disk_mib"] > 0
    assert 0 < rows["negfast"]["semantic_ids_s"] < rows["negfast"]["wall_s"]
    parts = {name: seconds for name, seconds in rows["first step"].items() if name.endswith(", s")}
    assert {"requests and the sample of valid, s", "what align learns from, s"} < set(parts)
    assert "verdict, s" not in parts  # it is fitted after the stages
    assert 0 < sum(parts.values()) < rows["first step"]["wall_s"]
    with pytest.raises(InputError, match="--events: found 'many'"):
        scale.run("many")
