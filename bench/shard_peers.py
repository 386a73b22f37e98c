"""How others store histories: each peer writes a slice of users and reads it back, as its documentation shows.

Every peer stores item ids, signs and times and gives them back in the caller's arrays. Checksums are on where a
format has them. A peer whose package is not installed is left out of the benchmark.
"""

import fcntl
import importlib.util
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import zstandard

from negfast.data.log import EventLog

Columns = tuple[np.ndarray, ...]  # item int32, sign uint8, time int64; or the items alone


class Reader(Protocol):
    """One written slice of users, opened."""

    def sequential(self, out: Columns) -> None:
        """All histories, one after another; a format with columns reads no more of them than ``out`` has."""
        ...

    def random(self, users: np.ndarray, out: Columns) -> int:
        """Histories of ``users``, one after another; returns their events."""
        ...


class Peer(Protocol):
    name: str
    checksums: bool

    @property
    def users(self) -> int | None:
        """At most so many users are written and read, so that slow formats end in bounded time."""
        ...

    @property
    def random_users(self) -> int | None:
        """At most so many users are read at random."""
        ...

    def write(self, folder: Path, log: EventLog) -> None: ...
    def open(self, folder: Path) -> Reader: ...


class PlanesZstd:
    """numpy planes: each byte of the items and of the time differences, and the signs, zstd-compressed in chunks."""

    name, checksums, users, random_users = "numpy-planes-zstd", True, None, 200
    chunk_users = 2048

    def write(self, folder: Path, log: EventLog) -> None:
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        frames, sizes = [], []
        for first in range(0, log.n_users, self.chunk_users):
            offsets = log.user_offsets[first : first + self.chunk_users + 1]
            events = slice(offsets[0], offsets[-1])
            gap = np.diff(log.time[events], prepend=0)
            starts = (offsets[:-1] - offsets[0])[np.diff(offsets) > 0]
            gap[starts] = log.time[events][starts]
            planes = [p for c in (log.item[events], gap.astype(np.uint32)) for p in c.view(np.uint8).reshape(-1, 4).T]
            for plane in (*planes, log.feedback[events]):
                frames.append(compressor.compress(plane.tobytes()))
                sizes.append(len(frames[-1]))
        folder.mkdir(parents=True)
        (folder / "planes").write_bytes(b"".join(frames))
        np.savez(folder / "index", offsets=log.user_offsets, sizes=np.array(sizes))

    def open(self, folder: Path) -> "PlanesReader":
        return PlanesReader(folder, self.chunk_users)


class PlanesReader:
    def __init__(self, folder: Path, chunk_users: int) -> None:
        index = np.load(folder / "index.npz")
        self.offsets, self.chunk_users = index["offsets"], chunk_users
        self.begin = np.concatenate([[0], np.cumsum(index["sizes"])])
        self.map = np.memmap(folder / "planes", mode="r")
        self.decompressor = zstandard.ZstdDecompressor()

    def _chunk(self, chunk: int, out: Columns) -> int:
        offsets = self.offsets[chunk * self.chunk_users : (chunk + 1) * self.chunk_users + 1]
        n = int(offsets[-1] - offsets[0])
        gap = np.empty(n, np.uint32)
        planes = list(out[0][:n].view(np.uint8).reshape(-1, 4).T)
        if len(out) > 1:
            planes += [*gap.view(np.uint8).reshape(-1, 4).T, out[1][:n]]
        for k, plane in enumerate(planes, start=chunk * 9):
            frame = self.map[self.begin[k] : self.begin[k + 1]].data
            plane[:] = np.frombuffer(self.decompressor.decompress(frame), np.uint8)
        if len(out) > 1:
            np.cumsum(gap, out=out[2][:n])
            lengths = np.diff(offsets)
            starts = (offsets[:-1] - offsets[0])[lengths > 0]
            out[2][:n] -= np.repeat(out[2][starts] - gap[starts], lengths[lengths > 0])
        return n

    def sequential(self, out: Columns) -> None:
        at = 0
        for chunk in range(-(-(len(self.offsets) - 1) // self.chunk_users)):
            at += self._chunk(chunk, tuple(column[at:] for column in out))

    def random(self, users: np.ndarray, out: Columns) -> int:
        room = int(np.diff(self.offsets[:: self.chunk_users], append=self.offsets[-1]).max())
        scratch: Columns = np.empty(room, np.int32), np.empty(room, np.uint8), np.empty(room, np.int64)
        at = 0
        for user in users:
            chunk = int(user) // self.chunk_users
            self._chunk(chunk, scratch)
            first = self.offsets[chunk * self.chunk_users]
            a, b = int(self.offsets[user] - first), int(self.offsets[user + 1] - first)
            for column, part in zip(out, scratch, strict=True):
                column[at : at + b - a] = part[a:b]
            at += b - a
        return at


NAMES = "item", "sign", "time"


def _table(log: EventLog) -> pa.Table:
    offsets = pa.array(log.user_offsets.astype(np.int32))
    columns = {"item": log.item, "sign": log.feedback, "time": log.time}
    return pa.table({k: pa.ListArray.from_arrays(offsets, pa.array(v)) for k, v in columns.items()})


def _copy_lists(table: pa.Table, out: Columns, at: int) -> int:
    """Flattens the list columns into ``out`` at position ``at``; returns the position after them."""
    for name, column in zip(NAMES, out, strict=False):
        place = at
        for chunk in table[name].chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=True)
            column[place : place + len(values)] = values
            place += len(values)
    return place


class Parquet:
    """A row a user, list columns, zstd, page checksums; the times delta-coded."""

    name, checksums, users, random_users = "parquet-zstd", True, None, 100

    def write(self, folder: Path, log: EventLog) -> None:
        folder.mkdir(parents=True)
        parquet.write_table(
            _table(log),
            folder / "events.parquet",
            row_group_size=8192,
            compression="zstd",
            use_dictionary=["item.list.element"],
            column_encoding={"time.list.element": "DELTA_BINARY_PACKED"},
            write_page_checksum=True,
        )

    def open(self, folder: Path) -> "ParquetReader":
        return ParquetReader(folder / "events.parquet")


class ParquetReader:
    def __init__(self, path: Path) -> None:
        self.file = parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        rows = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        self.first = np.concatenate([[0], np.cumsum(rows)])

    def sequential(self, out: Columns) -> None:
        at = 0
        for group in range(self.file.num_row_groups):
            at = _copy_lists(self.file.read_row_group(group, NAMES[: len(out)], use_threads=False), out, at)

    def random(self, users: np.ndarray, out: Columns) -> int:
        at = 0
        for user in users:
            group = int(np.searchsorted(self.first, user, side="right")) - 1
            table = self.file.read_row_group(group, use_threads=False)
            at = _copy_lists(table.slice(int(user - self.first[group]), 1), out, at)
        return at


class HuggingFaceArrow:
    """`datasets`, saved to disk uncompressed and memory-mapped."""

    name, checksums, users, random_users = "hf-arrow", False, None, 20_000

    def write(self, folder: Path, log: EventLog) -> None:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset(_table(log)).save_to_disk(str(folder), num_shards=1)

    def open(self, folder: Path) -> "HuggingFaceReader":
        import datasets

        return HuggingFaceReader(datasets.load_from_disk(str(folder)))


class HuggingFaceReader:
    def __init__(self, data: Any) -> None:
        self.data = data

    def sequential(self, out: Columns) -> None:
        at = 0
        for batch in self.data.with_format("arrow", NAMES[: len(out)]).iter(batch_size=4096):
            at = _copy_lists(batch, out, at)

    def random(self, users: np.ndarray, out: Columns) -> int:
        data = self.data.with_format("arrow")
        at = 0
        for first in range(0, len(users), 256):
            at = _copy_lists(data[users[first : first + 256].tolist()], out, at)
        return at


class MegatronMemmap:
    """Flat .bin files and an .idx of document offsets, sliced a document at a time, as Megatron's IndexedDataset is."""

    name, checksums, users, random_users = "megatron-memmap", False, None, None
    dtypes = np.int32, np.uint8, np.uint32

    def write(self, folder: Path, log: EventLog) -> None:
        folder.mkdir(parents=True)
        log.user_offsets.tofile(folder / "events.idx")
        for k, (column, dtype) in enumerate(zip((log.item, log.feedback, log.time), self.dtypes, strict=True)):
            with (folder / f"{k}.bin").open("wb") as file:
                for first in range(0, log.n_users, 256):  # documents go to the file as they come
                    last = min(first + 256, log.n_users)
                    file.write(column[log.user_offsets[first] : log.user_offsets[last]].astype(dtype).tobytes())

    def open(self, folder: Path) -> "MemmapReader":
        maps = [np.memmap(folder / f"{k}.bin", dtype, "r") for k, dtype in enumerate(self.dtypes)]
        return MemmapReader(np.fromfile(folder / "events.idx", np.int64), maps)


class MemmapReader:
    def __init__(self, offsets: np.ndarray, maps: list[np.memmap]) -> None:
        self.offsets, self.maps = offsets, [np.asarray(m) for m in maps]

    def sequential(self, out: Columns) -> None:
        self.random(np.arange(len(self.offsets) - 1), out)

    def random(self, users: np.ndarray, out: Columns) -> int:
        at = 0
        for begin, end in zip(self.offsets[users].tolist(), self.offsets[users + 1].tolist(), strict=True):
            to = at + end - begin
            for column, stored in zip(out, self.maps, strict=False):
                column[at:to] = stored[begin:end]
            at = to
        return at


def _samples(log: EventLog) -> Any:
    for a, b in pairwise(log.user_offsets):
        yield {
            "item": log.item[a:b].tobytes(),
            "sign": log.feedback[a:b].tobytes(),
            "time": log.time[a:b].astype(np.uint32).tobytes(),
        }


class SampleReader:
    """Random and sequential access to a dataset that gives a dictionary of bytes a sample."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def sequential(self, out: Columns) -> None:
        self.random(np.arange(len(self.data)), out)

    def random(self, users: np.ndarray, out: Columns) -> int:
        at = 0
        for user in users.tolist():
            sample = self.data[user]
            item = np.frombuffer(sample["item"], np.int32)
            to = at + len(item)
            out[0][at:to] = item
            if len(out) > 1:
                out[1][at:to] = np.frombuffer(sample["sign"], np.uint8)
                out[2][at:to] = np.frombuffer(sample["time"], np.uint32)
            at = to
        return at


class MosaicMds:
    """mosaicml-streaming MDS: zstd shards with xxh64; the first reader unpacks them to local raw files."""

    name, checksums, users, random_users = "mds-zstd", True, 20_000, 5_000

    def write(self, folder: Path, log: EventLog) -> None:
        from streaming import MDSWriter

        columns = {"item": "bytes", "sign": "bytes", "time": "bytes"}
        with MDSWriter(out=str(folder), columns=columns, compression="zstd", hashes=["xxh64"]) as writer:
            for sample in _samples(log):
                writer.write(sample)

    def open(self, folder: Path) -> SampleReader:
        from streaming import LocalDataset, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        unpacked = folder.with_name(folder.name + "-raw")
        if not unpacked.exists():
            shutil.copytree(folder, unpacked)
            with (folder.parent / "mds.lock").open("w") as lock:  # two at once collide in their shared memory
                fcntl.flock(lock, fcntl.LOCK_EX)
                clean_stale_shared_memory()
                for sample in StreamingDataset(local=str(unpacked), batch_size=1, validate_hash="xxh64"):
                    del sample
        return SampleReader(LocalDataset(local=str(unpacked)))


class LitData:
    """litdata chunks of 8 MB, zstd."""

    name, checksums, users, random_users = "litdata-zstd", False, 20_000, 2_000

    def write(self, folder: Path, log: EventLog) -> None:
        from litdata.streaming.writer import BinaryWriter

        folder.mkdir(parents=True)
        writer = BinaryWriter(str(folder), chunk_bytes="8MB", compression="zstd", compression_level="chunk")
        for index, sample in enumerate(_samples(log)):
            writer[index] = b"".join(sample.values())  # a dictionary is written as Arrow, which did not compress
        writer.done()
        writer.merge()

    def open(self, folder: Path) -> SampleReader:
        from litdata import StreamingDataset

        return SampleReader(SplitSamples(StreamingDataset(str(folder))))


class SplitSamples:
    """Samples that were joined to one string of 9 bytes an event."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, user: int) -> dict[str, memoryview]:
        view = memoryview(self.data[user])
        n = len(view) // 9
        return {"item": view[: 4 * n], "sign": view[4 * n : 5 * n], "time": view[5 * n :]}


def installed_peers() -> list[Peer]:
    """Those whose packages can be imported."""
    peers: list[Peer] = [PlanesZstd(), Parquet(), MegatronMemmap()]
    for package, peer in (("datasets", HuggingFaceArrow()), ("streaming", MosaicMds()), ("litdata", LitData())):
        if importlib.util.find_spec(package) is not None:
            peers.append(peer)
    return peers
