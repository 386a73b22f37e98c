"""Histories on disk: compressed, checksummed, memory-mapped shards (csrc/FORMAT.md), and what is packed from them."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from negfast import _core
from negfast.data.log import Cuts, EventLog
from negfast.errors import InputError
from negfast.files import atomic_file

START = _core.START  # the feedback of a start position, beside those of an event (negfast.data.log)
GAPS = _core.GAPS  # buckets of the time since the event before


@dataclass(frozen=True)
class PackedHistories:
    """B histories of T positions without padding, the A branches that see them, and what each has seen."""

    item: np.ndarray  # int32 [T], -1 at a start position
    feedback: np.ndarray  # uint8 [T], START at a start position
    gap: np.ndarray  # uint8 [T] in [0, GAPS)
    cu_seqlens: np.ndarray  # int32 [B + 1]: history b is the positions cu_seqlens[b]:cu_seqlens[b + 1]
    prefix: np.ndarray  # int32 [A] positions of its history that a branch sees, 1 or more
    branch_gap: np.ndarray  # uint8 [A] in [0, GAPS)
    seen_item: np.ndarray  # int32 [S] distinct items of the user before the moment, increasing within a branch
    seen_cu: np.ndarray  # int32 [A + 1]
    # The trie nodes above the seen items, one int32 array a level l = 1..L, each ordered by (branch, node).
    seen_node: list[np.ndarray]  # [M_l]
    seen_request: list[np.ndarray]  # [M_l]
    seen_count: list[np.ndarray]  # [M_l] seen leaves under the node
    seen_slot: list[np.ndarray]  # [S] which of the M_l a seen item is under


class Shard:
    """An open shard: the histories of ``n_users`` users over ``n_items`` items, ``n_events`` in all.

    Whatever is read has passed its checksum; InputError says which part of a damaged file did not.
    """

    def __init__(self, paths: list[str]) -> None:
        self._core = _core.Shard(paths)

    @property
    def n_users(self) -> int:
        return self._core.n_users

    @property
    def n_items(self) -> int:
        return self._core.n_items

    @property
    def n_events(self) -> int:
        return self._core.n_events

    def files(self) -> list[dict[str, Any]]:
        """What the header of every file says, oldest file first, and its sizes by stream in bytes."""
        return self._core.files()

    def offsets(self, users: np.ndarray) -> np.ndarray:
        """Where the events of ``users`` int32 [B] begin, one history after another: int64 [B + 1]. InputError for a
        user out of range."""
        offsets = np.empty(len(users) + 1, dtype=np.int64)
        self._core.offsets(users, offsets)
        return offsets

    def get_many(
        self,
        users: np.ndarray | None = None,
        threads: int = 1,
        out: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The histories of ``users`` int32 [B] (default: all), one after another.

        Returns (offsets int64 [B + 1], item int32 [N], feedback uint8 [N], time int64 [N] in UTC seconds, rounded
        down to the shard's resolution); user b's events are offsets[b]:offsets[b + 1]. ``out`` gives arrays of at
        least that length to write (item, feedback, time) to, e.g. pinned ones; slices of them are returned.
        Raises InputError for a user out of range or a damaged shard.
        """
        if users is None:
            users = np.arange(self.n_users, dtype=np.int32)
        offsets = self.offsets(users)
        n = int(offsets[-1])
        if out is None:
            out = np.empty(n, np.int32), np.empty(n, np.uint8), np.empty(n, np.int64)
        item, feedback, time = (column[:n] for column in out)
        self._core.read(users, offsets, item, feedback, time, threads)
        return offsets, item, feedback, time

    def tokens(
        self,
        users: np.ndarray | None,
        item_tokens: np.ndarray,
        threads: int = 1,
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Histories of ``users`` int32 [B] (None: all) as tokens: the row of ``item_tokens`` [I, L], of any dtype, for
        every event.

        Returns (offsets int64 [B + 1] in events, tokens [N, L]); ``out`` gives an array of at least N rows to write
        to. Raises InputError for a user out of range, a table that is too short, or a damaged shard.
        """
        if users is None:
            users = np.arange(self.n_users, dtype=np.int32)
        offsets = self.offsets(users)
        if out is None:
            out = np.empty((int(offsets[-1]), item_tokens.shape[1]), dtype=item_tokens.dtype)
        elif out.dtype != item_tokens.dtype or out.shape[1] != item_tokens.shape[1]:
            raise InputError(
                f"out: found {out.dtype} [{out.shape[1]}], expected {item_tokens.dtype} [{item_tokens.shape[1]}]"
            )
        elif not (out.flags.c_contiguous and out.flags.writeable):
            raise InputError("out: found a strided or read-only array, expected a writeable, contiguous one")
        tokens = out[: int(offsets[-1])]
        bytes_out = tokens.reshape(-1).view(np.uint8)
        self._core.read_rows(users, offsets, np.ascontiguousarray(item_tokens).view(np.uint8), bytes_out, threads)
        return offsets, tokens

    def pack(
        self,
        *,
        users: np.ndarray,
        first: np.ndarray,
        views: np.ndarray,
        branch_history: np.ndarray,
        moments: np.ndarray,
        item_nodes: np.ndarray,
        threads: int = 1,
    ) -> PackedHistories:
        """B histories and the A branches that see them.

        A history is a start position, then a position for each event shown, from event ``first`` of the user up to
        the last that a branch sees. ``views`` says what is shown: likes where bit 0 is set, dislikes where bit 1 is,
        exposures and withdrawals where both are. A branch sees the positions of its history with time < its moment.

        users int32 [B]; first int64 [B], counted within the user's events; views uint8 [B]; branch_history int32 [A],
        ascending; moments int64 [A], UTC seconds; item_nodes int32 [I, L]: the trie node above each item at each level.
        A branch has seen all items of the user with an event before its moment, also those before ``first`` or hidden.

        A gap is the time since the position before, in whole seconds s, as a bucket: 0 where there is no event
        before, else min(GAPS - 1, 1 + bits of s // 64), so 1 is under 64 s, 2 under 128 s, 23 from 4.25 years
        (negfast's choice). A branch's gap is the time from the last event that it sees to its moment.

        Raises InputError for arrays whose lengths differ, histories and branches out of range or out of order, a
        table that is too short, and for a damaged shard.
        """
        parts = self._core.pack(
            users=users,
            first=first,
            views=views,
            branch_history=branch_history,
            moments=moments,
            item_nodes=item_nodes,
            threads=threads,
        )
        nodes, seen = parts.nodes, parts.seen
        packed = PackedHistories(
            item=np.empty(parts.positions, np.int32),
            feedback=np.empty(parts.positions, np.uint8),
            gap=np.empty(parts.positions, np.uint8),
            cu_seqlens=np.empty(parts.histories + 1, np.int32),
            prefix=np.empty(parts.branches, np.int32),
            branch_gap=np.empty(parts.branches, np.uint8),
            seen_item=np.empty(seen, np.int32),
            seen_cu=np.empty(parts.branches + 1, np.int32),
            seen_node=[np.empty(m, np.int32) for m in nodes],
            seen_request=[np.empty(m, np.int32) for m in nodes],
            seen_count=[np.empty(m, np.int32) for m in nodes],
            seen_slot=[np.empty(seen, np.int32) for _ in nodes],
        )
        parts.write(**vars(packed), threads=threads)
        return packed


class ShardBuilder:
    """Builds a shard of events that come in any order, in bounded memory.

    Sorted runs of at most ``memory_bytes`` go to nameless files beside ``path`` and are merged by `finish`. Ties in
    time keep the order of arrival. Nothing appears at ``path`` before all of it is there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_users: int,
        n_items: int,
        time_unit: int = 1,
        memory_bytes: int = 1 << 30,
    ) -> None:
        self.path, self.n_users, self.n_items, self.time_unit = Path(path), n_users, n_items, time_unit
        self._sorter = _core.EventSorter(str(self.path.parent), n_users, n_items, memory_bytes)

    def add(self, user: np.ndarray, item: np.ndarray, feedback: np.ndarray, time: np.ndarray) -> None:
        """Takes events: user int32, item int32, feedback uint8, time int64 (UTC seconds), all [n].

        Raises InputError for an event out of range; the builder is of no use after that.
        """
        self._sorter.add(user, item, feedback, time)

    def finish(self, threads: int = 1) -> None:
        """Writes the shard, the same bytes for any number of threads."""
        self._sorter.write(str(self.path), self.n_users, self.n_items, self.time_unit, threads)
        _parts_path(self.path).unlink(missing_ok=True)


def write_shard(path: str | os.PathLike[str], log: EventLog, time_unit: int = 1, threads: int = 1) -> None:
    """Writes the histories of a log (its ``value`` column excepted) to a shard, in place of what was at ``path``.

    ``time_unit``: resolution of the stored times, seconds (86400 keeps days). The bytes do not depend on ``threads``.
    The file appears whole or not at all. Raises InputError for events out of order or out of range.
    """
    _write_histories(Path(path), log, np.empty(0, np.uint32), log.n_users, time_unit, threads)
    _parts_path(path).unlink(missing_ok=True)


def append_shard(
    path: str | os.PathLike[str],
    user: np.ndarray,
    item: np.ndarray,
    feedback: np.ndarray,
    time: np.ndarray,
    n_users: int,
    n_items: int,
    threads: int = 1,
) -> Path:
    """Adds later events to a shard without rewriting it: a part beside it, and its name in the list of parts.

    Arguments and errors as for `write_part`. Returns the new file.
    """
    shard = open_shard(path)
    part = Path(f"{os.fspath(path)}.{len(shard.files()):06d}")
    write_part(part, shard, user, item, feedback, time, n_users, n_items, threads)
    base, *listed = [*shard.files(), *Shard([str(part)]).files()]
    parts = [{"file": Path(f["path"]).name, "checksum": f["checksum"]} for f in listed]
    with atomic_file(_parts_path(path)) as temporary:
        temporary.write_text(json.dumps({"base_checksum": base["checksum"], "parts": parts}, indent=1) + "\n")
    return part


def write_part(
    part: str | os.PathLike[str],
    shard: Shard,
    user: np.ndarray,
    item: np.ndarray,
    feedback: np.ndarray,
    time: np.ndarray,
    n_users: int,
    n_items: int,
    threads: int = 1,
) -> None:
    """Writes events that come after those of ``shard`` to a file of their own, to be opened as `Shard([..., part])`.

    Columns as for `ShardBuilder.add`, in any order; n_users and n_items are the sizes from now on. The file appears
    whole or not at all. Raises InputError where an event comes before one of its user that the shard has, as readers
    put the parts of a history one after another.
    """
    if n_users < shard.n_users or n_items < shard.n_items:
        raise InputError(
            f"{part}: found {n_users} users and {n_items} items, expected {shard.n_users} and {shard.n_items} or more"
        )
    if len(user) == 0:
        raise InputError(f"{part}: found no events to append, expected some")
    order = np.lexsort((time, user))
    user, item, feedback, time = user[order], item[order], feedback[order], time[order]
    active, first = np.unique(user, return_index=True)
    if not 0 <= active[0] <= active[-1] < n_users:
        raise InputError(f"{part}: found users {active[0]} to {active[-1]}, expected 0 to {n_users - 1}")
    time_unit = shard.files()[0]["time_unit"]
    known = active[active < shard.n_users].astype(np.int32)
    offsets, _, _, old_time = shard.get_many(known, threads)
    has_events = np.flatnonzero(np.diff(offsets))
    late = time[first[has_events]] // time_unit * time_unit < old_time[offsets[1:][has_events] - 1]
    if late.any():
        who = has_events[late.argmax()]
        raise InputError(
            f"{part}: found an event of user {known[who]} at {time[first[who]]}, expected none before its last one, "
            f"{old_time[offsets[who + 1] - 1]}: write the shard anew"
        )
    log = EventLog(np.append(first, len(user)).astype(np.int64), item, feedback, time, None, n_items)
    _write_histories(Path(part), log, active.astype(np.uint32), n_users, time_unit, threads)


def open_shard(path: str | os.PathLike[str]) -> Shard:
    """Maps a shard and what was appended to it, and checks all but the histories, which are checked when first read.

    Raises InputError for a file that is missing, damaged, cut short, or of an unknown version.
    """
    path = Path(path)
    parts = _read_parts(path)
    if parts:
        base = Shard([str(path)])
        # A list for another base is what a rebuild left that was killed before it could remove the list.
        if base.files()[0]["checksum"] != parts["base_checksum"]:
            return base
    listed = parts["parts"] if parts else []
    shard = Shard([str(path), *(str(path.with_name(part["file"])) for part in listed)])
    for part, file in zip(listed, shard.files()[1:], strict=True):
        if part["checksum"] != file["checksum"]:
            raise InputError(f"{file['path']}: found checksum {file['checksum']}, expected {part['checksum']}")
    return shard


def histories(
    shard: Shard, cuts: Cuts | None = None, users_at_once: int = 65_536
) -> Iterator[tuple[np.ndarray, EventLog]]:
    """The histories of all users, some at a time so that memory is bounded: which users, int32 [B], and their log."""
    for first in range(0, shard.n_users, users_at_once):
        users = np.arange(first, min(first + users_at_once, shard.n_users), dtype=np.int32)
        yield users, EventLog(*shard.get_many(users), None, shard.n_items, None if cuts is None else cuts.take(users))


def _parts_path(path: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(path)}.parts")


def _read_parts(path: Path) -> dict[str, Any] | None:
    parts_path = _parts_path(path)
    try:
        parts = json.loads(parts_path.read_text("utf-8"))
        return {
            "base_checksum": int(parts["base_checksum"]),
            "parts": [{"file": str(p["file"]), "checksum": int(p["checksum"])} for p in parts["parts"]],
        }
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{parts_path}: damaged list of parts: {error}") from error


def _write_histories(
    path: Path, log: EventLog, user_list: np.ndarray, n_users: int, time_unit: int, threads: int
) -> None:
    columns = log.user_offsets, log.item, log.feedback, log.time
    _core.write_histories(str(path), *columns, user_list, n_users, log.n_items, time_unit, threads)


def describe_shard(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads all of a shard, checksums included, and tells its sizes by stream and its bits per event.

    ``order0_floor`` is the order-0 entropy of item, feedback, time difference and history length, bits per event: what
    a coder without context could reach. Raises InputError if the shard is damaged.
    """
    shard = open_shard(path)
    facts: dict[str, Any] = {"events": shard.n_events, "users": shard.n_users, "items": shard.n_items}
    facts["files"] = shard.files()
    bytes_of = {part: sum(file["bytes"][part] for file in facts["files"]) for part in facts["files"][0]["bytes"]}
    file_bytes = sum(file["file_bytes"] for file in facts["files"])
    facts["bytes"] = bytes_of | {"file": file_bytes}
    floor = _order0_floor(shard, min(file["time_unit"] for file in facts["files"]))
    events = max(1, shard.n_events)
    facts["bits_per_event"] = {part: 8 * size / events for part, size in bytes_of.items()} | {
        "file": 8 * file_bytes / events
    }
    facts["order0_floor"] = floor | {"total": sum(floor.values())}
    facts["checksums"] = "ok"  # reading all of it has verified every one
    return facts


def _order0_floor(shard: Shard, time_unit: int, users_at_once: int = 65_536) -> dict[str, float]:
    """Order-0 entropies in bits per event, of counts gathered a slice of users at a time."""
    counts: dict[str, Counter[int]] = {name: Counter() for name in ("item", "feedback", "time", "length")}
    for first in range(0, shard.n_users, users_at_once):
        users = np.arange(first, min(first + users_at_once, shard.n_users), dtype=np.int32)
        offsets, item, feedback, time = shard.get_many(users)
        units = time // time_unit
        gaps = np.diff(units, prepend=0)
        starts = offsets[:-1][np.diff(offsets) > 0]
        gaps[starts] = units[starts]
        columns = {"item": item, "feedback": feedback, "time": gaps, "length": np.diff(offsets)}
        for name, column in columns.items():
            values, times = np.unique(column, return_counts=True)
            counts[name].update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    return {name: _entropy_bits(c.values()) / max(1, shard.n_events) for name, c in counts.items()}


def _entropy_bits(counts: Iterable[int]) -> float:
    """Entropy of a sample with these counts times its size, bits."""
    n = np.fromiter(counts, dtype=np.float64)
    return float(-(n * np.log2(n / n.sum())).sum()) if len(n) else 0.0
