"""A prepared data set on disk: what `negfast prepare` writes and everything else reads."""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from negfast.data.items import ItemTable
from negfast.data.log import Cuts, EventLog
from negfast.data.shards import Shard, write_shard
from negfast.data.split import Split, split_requests
from negfast.errors import InputError
from negfast.files import atomic_file

FORMAT = 1
MANIFEST = "manifest.json"
VERIFIED = ".verified.json"  # which files were read against their checksums, and what they looked like then
EVENTS = "events.nfs"
VALUES = "values.safetensors"
CUTS = "cuts.safetensors"
USERS = "users.parquet"
ITEMS = "items.parquet"
SEMANTIC_IDS = "semantic_ids.safetensors"
ITEM_EMBEDDING = "item_embedding.safetensors"
EPOCH = date(1970, 1, 1)
CLOCK_TICK = 100_000_000  # ns, above the steps in which file systems count time


def day_of(when: str) -> int:
    """Days since 1970 of an ISO date."""
    return (date.fromisoformat(when) - EPOCH).days


def date_of(day: int) -> str:
    """The ISO date of a day since 1970."""
    return date.fromordinal(EPOCH.toordinal() + int(day)).isoformat()


@dataclass(frozen=True)
class Dataset:
    """An opened data set; its parts are read when first asked for."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Opens a directory after checking its version and its files, by `verify_files`. Raises InputError."""
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such data set directory")
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            raise InputError(f"{path}: not a prepared data set: no {MANIFEST}")
        try:
            manifest = json.loads(manifest_path.read_text("utf-8"))
            version, files = manifest["format"], manifest["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{manifest_path}: damaged: {error}") from error
        if version != FORMAT:
            raise InputError(f"{manifest_path}: format {version}, expected {FORMAT}; prepare the data again")
        verify_files(path, files, MANIFEST)
        return cls(path, manifest)

    def verify(self) -> None:
        """Reads every file and compares its SHA-256 with the manifest's. Raises InputError for a damaged one."""
        verify_files(self.path, self.manifest["files"], MANIFEST, again=True)

    @property
    def horizon(self) -> int:
        """H, days."""
        return self.manifest["split"]["horizon"]

    @property
    def valid_day(self) -> int:
        return day_of(self.manifest["split"]["valid"])

    @property
    def test_day(self) -> int:
        return day_of(self.manifest["split"]["test"])

    @property
    def end_day(self) -> int:
        """The day before which everything lies."""
        return max(day_of(self.manifest["days"]["last"]), self.test_day) + 1

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What was appended to the data set, oldest first (`negfast.prepare.append`)."""
        return self.manifest.get("parts", [])

    def _files_of(self, name: str) -> list[Path]:
        """The file ``name`` and those of its kind that were appended."""
        numbered = [f"{name}.{number:06d}" for number in range(1, len(self.parts) + 1)]
        return [self.path / name, *(self.path / n for n in numbered if n in self.manifest["files"])]

    @cached_property
    def shard(self) -> Shard:
        return Shard([str(path) for path in self._files_of(EVENTS)])

    @cached_property
    def log(self) -> EventLog:
        offsets, item, feedback, time = self.shard.get_many(None)
        value = self._values() if VALUES in self.manifest["files"] else None
        return EventLog(offsets, item, feedback, time, value, self.manifest["counts"]["items"], self.cuts)

    @cached_property
    def cuts(self) -> Cuts | None:
        """Where the parts of a log that is split within communities begin."""
        if CUTS not in self.manifest["files"]:
            return None
        return Cuts(self.valid_day, _load_tensors(self.path / CUTS)["moments"])

    def _values(self) -> np.ndarray:
        """Those of the base and of every part, each sorted by user, in the order of the log."""
        values = [_load_tensors(path)["value"] for path in self._files_of(VALUES)]
        if len(values) == 1:
            return values[0]
        users = []
        for path in self._files_of(EVENTS):
            offsets = Shard([str(path)]).get_many()[0]
            users.append(np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets)))
        return np.concatenate(values)[np.argsort(np.concatenate(users), kind="stable")]

    @cached_property
    def items(self) -> ItemTable:
        table = _read_parquet(self.path / ITEMS)
        attributes = {}
        if "attributes" in table.column_names:
            for row_field in table.schema.field("attributes").type:
                column = pa.chunked_array([c.field(row_field.name) for c in table["attributes"].chunks])
                attributes[row_field.name] = [tuple(values) for values in column.to_pylist()]
        embedding = None
        if ITEM_EMBEDDING in self.manifest["files"]:
            embedding = _load_tensors(self.path / ITEM_EMBEDDING)["embedding"]
        original = self.manifest.get("original_items")
        return ItemTable(
            table["id"].to_pylist(),
            table["text"].to_pylist(),
            attributes,
            embedding,
            original,
            self.embedding,
            self.codes,
        )

    @cached_property
    def user_ids(self) -> list[str]:
        return [user_id for path in self._files_of(USERS) for user_id in _read_parquet(path)["id"].to_pylist()]

    @cached_property
    def semantic_ids(self) -> dict[str, np.ndarray]:
        return _load_tensors(self.path / SEMANTIC_IDS)

    @property
    def codes(self) -> np.ndarray:
        """Semantic IDs, uint16 [I, L]."""
        return self.semantic_ids["codes"]

    @property
    def embedding(self) -> np.ndarray:
        """What the semantic IDs were made of, float32 [I, D]."""
        return self.semantic_ids["embedding"]

    @property
    def fingerprint(self) -> str:
        """The same for data sets of the same events, items, semantic IDs and split; runs keep that of theirs."""
        files = {name: record["sha256"] for name, record in self.manifest["files"].items()}
        described = json.dumps([files, self.manifest["split"]], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    @property
    def extends(self) -> list[str]:
        """Fingerprints of the data sets that this one was made of by adding events, oldest first."""
        return self.manifest.get("extends", [])

    def refuse_communities(self) -> None:
        """InputError where the data set is split within communities: new events would need a split of their own."""
        if CUTS in self.manifest["files"]:
            within = self.manifest["split"]["within"]
            raise InputError(f"{self.path}: is split within {within!r}, expected a split by date to add events to")

    def replace_manifest(self, manifest: dict[str, Any]) -> None:
        """Makes the directory the data set that ``manifest`` describes, at once or not at all."""
        with atomic_file(self.path / MANIFEST) as temporary:
            temporary.write_text(_manifest_text(manifest), "utf-8")

    def split(self) -> Split:
        """Requests of the log, split at the manifest's dates."""
        return split_requests(self.log, self.horizon, self.valid_day, self.test_day)


def write_dataset(
    directory: Path,
    log: EventLog,
    user_ids: list[str],
    items: ItemTable,
    semantic_ids: dict[str, np.ndarray],
    manifest: dict[str, Any],
) -> None:
    """Fills an empty directory from a log in memory; see `finish_dataset`. Days that come later are for
    `negfast.prepare.append.append_events`."""
    write_shard(directory / EVENTS, log)
    if log.value is not None:
        save_file({"value": log.value}, directory / VALUES)
    finish_dataset(directory, pa.array(user_ids, pa.string()), items, semantic_ids, manifest, log.cuts)


def finish_dataset(
    directory: Path,
    user_ids: pa.StringArray,
    items: ItemTable,
    semantic_ids: dict[str, np.ndarray],
    manifest: dict[str, Any],
    cuts: Cuts | None = None,
) -> None:
    """Makes a data set of a directory that holds the events (EVENTS and, where there are values, VALUES).

    ``semantic_ids`` holds codes, embedding and the quantiser's tensors. ``manifest`` is what is said of the data; the
    format version and the files' sizes and checksums are added.
    """
    parquet.write_table(pa.table({"id": user_ids}), directory / USERS, compression="zstd")
    parquet.write_table(_item_table(items, semantic_ids["codes"]), directory / ITEMS, compression="zstd")
    save_file({k: np.ascontiguousarray(v) for k, v in semantic_ids.items()}, directory / SEMANTIC_IDS)
    if items.embedding is not None:
        save_file({"embedding": np.ascontiguousarray(items.embedding)}, directory / ITEM_EMBEDDING)
    if cuts is not None:
        save_file({"moments": cuts.moments}, directory / CUTS)
    files = {path.name: file_record(path) for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(_manifest_text({"format": FORMAT, **manifest, "files": files}), "utf-8")


def is_data_folder(path: Path) -> bool:
    """Whether ``path`` plainly is a data set."""
    return (path / MANIFEST).is_file() and (path / EVENTS).is_file()


def refuse_data_folder(out: Path) -> None:
    """Raises InputError where ``out`` is a data set, or lies in one."""
    for folder in (out.absolute(), *out.absolute().parents):
        if is_data_folder(folder):
            raise InputError(f"{out}: lies in the data set {folder}; choose another --out")


def verify_files(folder: Path, files: dict[str, dict[str, Any]], source: str, again: bool = False) -> None:
    """Raises InputError where a file of ``folder`` is not as ``files`` records it (`file_record`).

    ``source`` names the file that holds the records. Each file is read once: VERIFIED, in the folder, keeps its
    checksum with its size, times and inode, and while these stay the same it is not read again, unless ``again``.
    """
    kept: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError, TypeError):
        kept = dict(json.loads((folder / VERIFIED).read_text("utf-8")))
    found = {}
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing, expected by {source}")
        status, started = path.stat(), time.time_ns()
        if status.st_size != recorded["bytes"]:
            raise InputError(f"{path}: {status.st_size} bytes, expected {recorded['bytes']}")
        looks = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, recorded["sha256"]]
        if again or kept.get(name) != looks:
            if file_record(path)["sha256"] != recorded["sha256"]:
                raise InputError(f"{path}: damaged: its SHA-256 is not that of {source}")
            if started - status.st_ctime_ns < CLOCK_TICK:
                continue  # a change within the clock's step would look the same: not kept
        found[name] = looks
    if found != kept:
        with suppress(OSError, InputError), atomic_file(folder / VERIFIED) as temporary:
            temporary.write_text(json.dumps(found), "utf-8")


def file_record(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as manifests keep them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest_text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def _item_table(items: ItemTable, codes: np.ndarray) -> pa.Table:
    columns: dict[str, pa.Array] = {"id": pa.array(items.ids, pa.string()), "text": pa.array(items.text, pa.string())}
    if items.attributes:
        lists = [pa.array(values, pa.list_(pa.string())) for values in items.attributes.values()]
        columns["attributes"] = pa.StructArray.from_arrays(lists, names=list(items.attributes))
    flat = pa.array(np.ascontiguousarray(codes).reshape(-1), pa.uint16())
    columns["codes"] = pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])
    return pa.table(columns)


def _read_parquet(path: Path) -> pa.Table:
    try:
        return parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged: {' '.join(str(error).split())}") from error


def _load_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged: {' '.join(str(error).split())}") from error
