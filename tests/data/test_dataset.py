"""Opening a data set: damage is found and named; the embedded sample is what it says."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from negfast.data import dataset
from negfast.data.dataset import Dataset, write_dataset
from negfast.data.items import ItemTable
from negfast.data.log import DISLIKE, EventLog
from negfast.errors import InputError
from negfast.prepare.build import SemanticIdSettings
from negfast.prepare.samples import prepare_movietweetings
from negfast.sid.quantize import Quantizer


@pytest.fixture
def written(tmp_path):
    """A small data set straight through write_dataset."""
    rng = np.random.default_rng()
    log = EventLog(
        np.array([0, 3, 3, 5]), rng.integers(0, 4, 5).astype(np.int32), rng.integers(0, 3, 5).astype(np.uint8),
        np.array([5, 5, 90_000, 7, 8]), rng.normal(size=5).astype(np.float32), 4,
    )  # fmt: skip
    items = ItemTable(["a", "b", "c", "d"], ["A", "", "Ç", "d\n"], {"g": [("x", "y"), (), ("z",), ()]})
    sids: dict[str, np.ndarray] = {
        "codes": np.array([[0, 1], [0, 2], [3, 0], [3, 1]], np.uint16),
        "codebooks": rng.normal(size=(2, 4, 3)).astype(np.float32),
        "embedding": rng.normal(size=(4, 3)).astype(np.float32),
    }
    manifest = {
        "counts": {"users": 3, "items": 4, "events": 5},
        "split": {"horizon": 7, "valid": "1970-02-01", "test": "1970-03-01"},
    }
    path = tmp_path / "data"
    path.mkdir()
    write_dataset(path, log, ["u", "v", "w"], items, sids, manifest)
    return path, log, items, sids


def test_what_is_written_reads_back(written):
    path, log, items, sids = written
    data = Dataset.open(path)
    for column in ("user_offsets", "item", "feedback", "time", "value"):
        np.testing.assert_array_equal(getattr(data.log, column), getattr(log, column))
    assert data.items == items
    assert data.user_ids == ["u", "v", "w"]
    codebooks = Quantizer.from_tensors(data.semantic_ids).codebooks
    for name, found in (("codes", data.codes), ("embedding", data.embedding), ("codebooks", codebooks)):
        np.testing.assert_array_equal(found, sids[name])
    assert (data.horizon, data.valid_day, data.test_day) == (7, 31, 59)


def test_every_flipped_byte_is_found(written):
    path, rng = written[0], np.random.default_rng()
    data = Dataset.open(path)
    data.verify()
    for name in data.manifest["files"]:
        file = path / name
        good = file.read_bytes()
        for position in [0, len(good) - 1, *rng.integers(0, len(good), 3)]:
            bad = bytearray(good)
            bad[position] ^= 1 << rng.integers(8)
            file.write_bytes(bad)
            with pytest.raises(InputError, match=f"{name}: damaged"):
                Dataset.open(path).verify()
        file.write_bytes(good)
    Dataset.open(path).verify()


def test_opening_reads_each_file_once(written, monkeypatch):
    path, record = written[0], dataset.file_record
    read: list[str] = []

    def recorded(file: Path) -> dict[str, Any]:
        read.append(file.name)
        return record(file)

    monkeypatch.setattr(dataset, "file_record", recorded)
    time.sleep(2 * dataset.CLOCK_TICK / 1e9)  # younger files are read again
    files = set(Dataset.open(path).manifest["files"])
    assert set(read) == files
    read.clear()
    Dataset.open(path)
    assert read == []
    Dataset.open(shutil.copytree(path, path.with_name("copy")))  # other inodes
    assert set(read) == files
    read.clear()
    (path / dataset.VERIFIED).write_text("[7]")
    Dataset.open(path)
    assert set(read) == files


def test_a_flipped_byte_is_found_after_the_file_was_read_once(written):
    """Also where the time of change is set back, as rsync and backup tools do."""
    path = written[0]
    time.sleep(2 * dataset.CLOCK_TICK / 1e9)
    Dataset.open(path)
    file = path / "users.parquet"
    times = file.stat()
    bad = bytearray(file.read_bytes())
    bad[len(bad) // 2] ^= 1
    file.write_bytes(bad)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=r"users\.parquet: damaged: its SHA-256 is not that of manifest\.json"):
        Dataset.open(path)


def test_a_missing_or_cut_file_is_found_at_once(written):
    path = written[0]
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        file.write_bytes(good[:-2])
        with pytest.raises(InputError, match=f"{file.name}: (damaged|.* bytes, expected)") as error:
            Dataset.open(path).verify()
        assert "\n" not in str(error.value)
        file.unlink()
        with pytest.raises(InputError, match=file.name):
            Dataset.open(path)
        file.write_bytes(good)
    Dataset.open(path)


def test_another_format_version_is_refused(written):
    path = written[0] / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(InputError, match="format 99, expected 1"):
        Dataset.open(written[0])


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(InputError, match="no such data set directory"):
        Dataset.open(tmp_path / "none")
    with pytest.raises(InputError, match="not a prepared data set"):
        Dataset.open(tmp_path)


def test_files_of_the_right_size_but_the_wrong_kind(written):
    path = written[0]
    for name, reader in (("users.parquet", "user_ids"), ("semantic_ids.safetensors", "codes")):
        file = path / name
        file.write_bytes(b"\0" * file.stat().st_size)
        with pytest.raises(InputError, match=f"{name}: damaged"):
            getattr(Dataset.open(path), reader)


@pytest.mark.job
def test_the_embedded_movietweetings(tmp_path):
    """Random codes, so that no encoder need run; the counts are those of the source's README and the design."""
    said: list[str] = []
    data = prepare_movietweetings(
        tmp_path / "data", semantic_ids=SemanticIdSettings(quantizer="random", encoder="tfidf"), report=said.append
    )
    assert len(data.log) == 100_000
    assert (data.log.n_users, data.log.n_items) == (16_554, 10_506)
    assert int((data.log.feedback == DISLIKE).sum()) == 14_285
    assert data.items.ids[0] == "0002844"
    assert data.items.text[0] == "Fantômas - À l'ombre de la guillotine (1913)"
    assert data.items.attributes["genres"][0] == ("Crime", "Drama")
    assert data.items.attributes["year"][0] == ("1913",)
    assert all(len(year) == 1 for year in data.items.attributes["year"])
    value = data.log.value
    assert value is not None and value.min() >= 0 and value.max() == 10
    assert (value[data.log.feedback == DISLIKE] <= 5).all()
    np.testing.assert_array_equal(np.sort(np.unique(data.log.item)), np.arange(10_506))
    split = data.split()
    with_dislikes = [int(part.has_dislikes.sum()) for part in (split.train, split.valid, split.test)]
    assert with_dislikes == [5_521, 1_244, 2_732]
    assert "train: 38,442 active user-days, 5,521 with a dislike ahead" in said


def test_items_without_attributes(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    log = EventLog(np.array([0, 1]), np.zeros(1, np.int32), np.array([2], np.uint8), np.array([3]), None, 1)
    sids: dict[str, np.ndarray] = {
        "codes": np.zeros((1, 3), np.uint16),
        "codebooks": np.zeros((3, 4, 0), np.float32),
        "embedding": np.zeros((1, 0), np.float32),
    }
    write_dataset(path, log, ["u"], ItemTable(["a"], [""]), sids, {"counts": {"items": 1}})
    data = Dataset.open(path)
    assert data.items == ItemTable(["a"], [""])
    assert data.log.value is None
    assert Quantizer.from_tensors(data.semantic_ids).codebooks.shape == (3, 4, 0)
    assert parquet.read_schema(path / "items.parquet").field("codes").type == pa.list_(pa.uint16(), 3)
