"""From the files of a log to its events: read and checked block by block, sorted out of core, given user by user."""

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negfast.data.dataset import date_of
from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.prepare.events import (
    REST,
    EventMapping,
    Events,
    Report,
    Selection,
    event_columns,
    refuse_nulls,
    values_of,
)
from negfast.prepare.readers import (
    DATA_SUFFIXES,
    BadRows,
    Encoded,
    Source,
    encode,
    format_suffix,
    read_blocks,
    to_strings,
)
from negfast.prepare.rules import Rule, feedback
from negfast.prepare.sorter import LogSorter
from negfast.prepare.times import Times, check_times, nanoseconds
from negfast.progress import Progress

STRAY_SHARE, STRAY_DAYS, STRAY_GAPS = 0.01, 30, 10  # see `LogReader._refuse_stray`
COMMONEST, KEPT_VALUES = 5, 10_000  # values of a rule's column that an error shows; of which counts are kept
CHUNK_EVENTS = 1 << 18  # users are given together until they have so many
LONG = 1 << 26  # bytes of files that are worth a progress bar

ReadFile = Callable[[Path, BadRows], Iterator[tuple[Source, int]]]


def log_files(paths: Sequence[Path]) -> list[Path]:
    """The files of a log, directories replaced by all data files in them, in the order of their names with numbers in
    them as numbers: whichever order they are given in, events of equal times keep one order. Raises InputError."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = [file for file in path.rglob("*") if file.is_file() and format_suffix(file) in DATA_SUFFIXES]
        inside = [file for file in inside if not any(part[0] in "._" for part in file.relative_to(path).parts)]
        if not inside:
            raise InputError(f"{path}: found no data file in the directory, expected {', '.join(DATA_SUFFIXES)}")
        found += inside
    return sorted(found, key=_in_order)


def _in_order(path: Path) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def read_file(mapping: EventMapping) -> ReadFile:
    """How the event files of a mapping are read."""
    columns = event_columns(mapping)
    return lambda path, bad: read_blocks(path, columns, names=mapping.columns, separator=mapping.separator, bad=bad)


@dataclass(frozen=True)
class _Columns:
    """The columns of a block."""

    user: pa.Array  # int64 or strings [N]
    item: pa.Array
    ticks: np.ndarray  # int64 [N]
    per_second: int
    feedback: np.ndarray  # uint8 [N]
    held: set[Rule]
    of_rule: dict[str, Encoded]
    value: np.ndarray | None  # float32 [N]
    community: Encoded | None


@dataclass
class LogReader:
    """Reads the files of a log into a `LogSorter`, and keeps what concerns the log as a whole.

    A ``whole`` log has dislikes and likes, a day may do without; each rule of ``must_hold`` holds for some event.
    ``takes_back`` tells of a block's rows which feedback each takes back, uint8 [N], for `negfast.prepare.recipes`.
    """

    files: Sequence[Path]
    read_file: ReadFile
    mapping: EventMapping
    report: Report
    selection: Selection
    now: float
    must_hold: Sequence[Rule] = ()
    whole: bool = True
    takes_back: Callable[[Source], np.ndarray] | None = None

    feedback: np.ndarray = field(default_factory=lambda: np.zeros(4, np.int64), init=False)  # events of each
    days: Counter[int] = field(default_factory=Counter, init=False)  # events of each
    first_item: tuple[str, str] = field(default=("", ""), init=False)  # of the log, and where it stands
    communities: dict[str, int] = field(default_factory=dict, init=False)  # those of the events, and their numbers
    _day_place: dict[int, tuple[int, int]] = field(default_factory=dict, init=False)  # block and row of its first event
    _held: set[Rule] = field(default_factory=set, init=False)
    _values: dict[str, Counter[object]] = field(default_factory=dict, init=False)  # of the rules' columns
    _integers: dict[str, bool] = field(default_factory=dict, init=False)  # whether ids are, by column
    _early: int = field(default=0, init=False)
    _late: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._times = Times(self.mapping.time, self.mapping.time_unit, self.report)

    def read(self, sorter: LogSorter) -> None:
        """Reads all files. Raises InputError."""
        bad = BadRows(self.selection.skip_bad_rows)
        found = 0
        size = sum(path.stat().st_size for path in self.files if path.is_file())
        with Progress("reading", size >> 20, "MB", quiet=size < LONG) as bar:
            began = time.monotonic()
            for number, (block, done) in enumerate(self._blocks(bad)):
                found += block.table.num_rows
                source = self._selected(block, bad)
                if source.table.num_rows:
                    columns = self._columns(source, bad)
                    if bad.rows:
                        source = bad.remove(source)
                        columns = self._columns(source, bad)
                    self._keep(source, columns, number)
                    sorter.add(self._block_of(source, columns))
                rate = len(sorter) / max(time.monotonic() - began, 1e-9)
                bar.update(done >> 20, f"{len(sorter):,} rows, {rate:,.0f} rows/s")
        sorter.end()
        path = self.files[0]
        if found == 0 and not bad.count:
            raise InputError(f"{path}: no events, expected at least one row")
        if self.selection.first_day is not None or self.selection.last_day is not None:
            self.selection.left_out.update(before_from=self._early, after_until=self._late)
            self.report(f"days: left out {self._early:,} events before --from and {self._late:,} after --until")
        if bad.skip:
            self.selection.left_out["bad_rows"] = bad.count
            self.report(f"bad rows: {bad.count:,} skipped, {len(sorter):,} rows left" + (":" if bad.count else ""))
            for line in bad.first:
                self.report(f"  {line}")
        if len(sorter) == 0:
            raise InputError(f"{path}: no events are left, expected at least one")
        for rule in self.must_hold:
            if rule not in self._held:
                raise InputError(f"{path}: no event matches {rule}; {rule.column} holds {self._commonest(rule.column)}")
        if self.whole:
            self._refuse_without()
        self._refuse_stray()

    def where(self, holds: Callable[[Source], np.ndarray]) -> str:
        """The place of the first event for which ``holds``; reads the files again, on the way to an error."""
        bad = BadRows(self.selection.skip_bad_rows)
        for block, _ in self._blocks(bad):
            source = self._read_again(block, bad)
            rows = np.flatnonzero(holds(source))
            if len(rows):
                return source.where(int(rows[0]))
        raise RuntimeError("the files of the log changed while they were read")

    def _read_again(self, block: Source, bad: BadRows) -> Source:
        """The events of a block that were kept."""
        source = self._selected(block, bad)
        if source.table.num_rows:
            self._columns(source, bad)
        return bad.remove(source)

    def _blocks(self, bad: BadRows) -> Iterator[tuple[Source, int]]:
        """Every block, with how many bytes of all files are read by its end. Raises InputError where files differ in
        kind or in types."""
        first: Source | None = None
        before = 0
        for path in self.files:
            for block, done in self.read_file(path, bad):
                if first is None:
                    first, schema = block, block.table.schema
                if (first.text is None) != (block.text is None):
                    raise InputError(f"{first.path} and others: found text and Parquet, expected one kind")
                if block.table.schema != schema:
                    try:
                        schema = pa.unify_schemas([schema, block.table.schema], promote_options="permissive")
                    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                        message = " ".join(str(error).split())
                        raise InputError(f"{first.path}, {path}: columns of different types: {message}") from error
                yield block, before + done
            before += path.stat().st_size

    def _selected(self, block: Source, bad: BadRows) -> Source:
        """The rows of the days that are kept, and those whose day is not known."""
        first, last = self.selection.first_day, self.selection.last_day
        if (first is None and last is None) or block.table.num_rows == 0:
            return block
        ticks, per_second = self._times.read(block, bad)
        day = ticks // per_second // DAY
        early = np.zeros(len(day), bool) if first is None else day < first
        late = np.zeros(len(day), bool) if last is None else day > last
        self._early, self._late = self._early + int(early.sum()), self._late + int(late.sum())
        kept = ~(early | late)
        kept[list(bad.rows)] = True
        bad.rows = {}
        return block.take(np.flatnonzero(kept))

    def _columns(self, source: Source, bad: BadRows) -> _Columns:
        """Every column of a block. Raises InputError for the first bad row, or gives bad rows to ``bad`` if that skips
        them."""
        mapping = self.mapping
        user, item = (self._ids(source, name, bad) for name in (mapping.user, mapping.item))
        ticks, per_second = self._times.read(source, bad)
        check_times(source, mapping.time, ticks, per_second, bad, self.now)
        of_rule = {rule.column: encode(source, rule.column) for rule in (*mapping.dislike, *mapping.like)}
        rest = EXPOSED if mapping.like else REST[mapping.rest]
        kinds, held = feedback(of_rule, mapping.dislike, mapping.like, rest, bad)
        value = None if mapping.value is None else values_of(encode(source, mapping.value), bad)
        community = None
        if mapping.community is not None:
            community = encode(source, mapping.community)
            missing = np.flatnonzero(community.codes < 0)
            bad.add(source, missing, lambda row: f"no {mapping.community}, expected a community for --split-within")
            to_strings(community, bad)
        return _Columns(user, item, ticks, per_second, kinds, held, of_rule, value, community)

    def _ids(self, source: Source, name: str, bad: BadRows) -> pa.Array:
        """The ids of a column: int64 where the log's first block has integers, else strings."""
        values = source.table[name]
        whole = pa.types.is_integer(values.type) and not pa.types.is_uint64(values.type)
        integers = self._integers.setdefault(name, whole)
        if integers and whole:
            refuse_nulls(source, name, np.flatnonzero(pc.is_null(values).to_numpy()), bad)
            return pc.fill_null(values.cast(pa.int64()), 0).combine_chunks()
        column = encode(source, name)
        refuse_nulls(source, name, np.flatnonzero(column.codes < 0), bad)
        strings = to_strings(column, bad)
        ids = pa.DictionaryArray.from_arrays(pa.array(column.codes, mask=column.codes < 0), strings)
        return ids.cast(pa.string()).cast(pa.int64()) if integers else ids

    def _keep(self, source: Source, columns: _Columns, number: int) -> None:
        """Adds what a block says of the whole log."""
        if not len(columns.feedback):
            return
        if not self.days:
            self.first_item = str(columns.item[0].as_py()), source.where(0)
        days, first, counts = np.unique(
            columns.ticks // columns.per_second // DAY, return_index=True, return_counts=True
        )
        for day, row, count in zip(days.tolist(), first.tolist(), counts.tolist(), strict=True):
            self.days[day] += count
            self._day_place.setdefault(day, (number, row))
        self.feedback += np.bincount(columns.feedback, minlength=4)
        self._held |= columns.held
        for name, column in columns.of_rule.items():
            counter = self._values.setdefault(name, Counter())
            counter.update(column.counts())
            if len(counter) > 2 * KEPT_VALUES:
                self._values[name] = Counter(dict(counter.most_common(KEPT_VALUES)))

    def _block_of(self, source: Source, columns: _Columns) -> pa.Table:
        arrays: dict[str, pa.Array] = {
            "user": columns.user,
            "item": columns.item,
            "time": pa.array(nanoseconds(columns.ticks, columns.per_second)),
            "feedback": pa.array(columns.feedback),
        }
        if columns.value is not None:
            arrays["value"] = pa.array(columns.value)
        if self.takes_back is not None:
            arrays["takes_back"] = pa.array(self.takes_back(source))
        if (community := columns.community) is not None:
            names = to_strings(community).to_pylist()
            numbers = [self.communities.setdefault(name, len(self.communities)) for name in names]
            arrays["community"] = pa.array(np.array(numbers, np.int32)[community.codes])
        return pa.table(arrays)

    def _commonest(self, column: str) -> str:
        """``9 (360), 8 (12), ...``: the values that most rows have."""
        counts = self._values.get(column, Counter())
        shown = [f"{value} ({count:,})" for value, count in counts.most_common(COMMONEST)]
        return ", ".join([*shown, *(["..."] if len(counts) > COMMONEST else [])]) or "nothing"

    def _refuse_without(self) -> None:
        """InputError for a log without dislikes or likes, unless it was said that it has no likes."""
        path, mapping = self.files[0], self.mapping
        dislike, like = (" or ".join(map(str, rules)) for rules in (mapping.dislike, mapping.like))
        held = "; ".join(f"{name} holds {self._commonest(name)}" for name in self._values)
        if not self.feedback[DISLIKE]:
            raise InputError(f"{path}: no dislikes: no event matches {dislike}; {held}")
        if self.feedback[LIKE]:
            return
        if like:
            raise InputError(f"{path}: no likes: no event matches {like} and is no dislike; {held}")
        if mapping.rest == "like":
            raise InputError(f"{path}: no likes: every event matches {dislike}; {held}")
        self.report("warning: no likes (--rest exposed without --like-rule): nothing to tell dislikes from")

    def _refuse_stray(self) -> None:
        """InputError for a date far from the others, which would stretch the log and its split.

        At either end at most STRAY_SHARE of the events, more than STRAY_DAYS days and STRAY_GAPS times the longest gap
        of the others away, are stray (negfast's choice), unless --from or --until say that they are not.
        """
        day = np.array(sorted(self.days))
        counts = np.array([self.days[d] for d in day.tolist()])
        few = int(STRAY_SHARE * counts.sum())
        low, high = (int(np.searchsorted(np.cumsum(c), few, side="right")) for c in (counts, counts[::-1]))
        high = len(day) - high  # days before day[low] and from day[high] on may be stray
        if low >= high:
            return
        gaps = np.diff(day)
        far = max(STRAY_DAYS, STRAY_GAPS * int(gaps[low : high - 1].max(initial=1)))
        early, late = np.flatnonzero(gaps[:low] > far), np.flatnonzero(gaps[high - 1 :] > far) + high - 1
        if len(early) and self.selection.first_day is None:
            keep, stray = f"--from {date_of(day[early[-1] + 1])}", day <= day[early[-1]]
        elif len(late) and self.selection.last_day is None:
            keep, stray = f"--until {date_of(day[late[0]])}", day > day[late[0]]
        else:
            return
        first = min(day[stray].tolist(), key=self._day_place.__getitem__)
        number, row = self._day_place[first]
        bad = BadRows(self.selection.skip_bad_rows)
        block, _ = next(itertools.islice(self._blocks(bad), number, None))
        raise InputError(
            f"{self._read_again(block, bad).where(row)}: {date_of(first)} is far from the other dates "
            f"({counts[stray].sum():,} of {counts.sum():,} events are); {keep} leaves such events out"
        )


@dataclass(frozen=True)
class SortedLog:
    """A log that was read: its ids, and its events user by user."""

    sorter: LogSorter
    user_ids: pa.StringArray
    item_ids: pa.StringArray
    first_day: int  # days since 1970
    last_day: int

    def chunks(self) -> Iterator[tuple[EventLog, dict[str, np.ndarray]]]:
        """The histories of all users, some consecutive ones at a time, and where the log says so, what their events
        take back, "takes_back" uint8 [N], and the number of their "community", int32 [N]."""
        columns: list[dict[str, np.ndarray]] = []
        events, first_user = 0, 0
        for batch in itertools.chain(self.sorter.sorted(self.user_ids, self.item_ids), [None]):
            last = len(self.user_ids) if batch is None else int(batch["user"][-1])
            if batch is not None:
                columns.append(batch)
                events += len(batch["user"])
                if events < CHUNK_EVENTS or last == first_user:
                    continue
            rows = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
            end = int(np.searchsorted(rows["user"], last))
            offsets = np.searchsorted(rows["user"][:end], np.arange(first_user, last + 1))
            yield (
                EventLog(
                    offsets,
                    rows["item"][:end],
                    rows["feedback"][:end],
                    rows["time"][:end],
                    rows["value"][:end] if "value" in rows else None,
                    len(self.item_ids),
                ),
                {name: rows[name][:end] for name in ("takes_back", "community") if name in rows},
            )
            columns, events, first_user = [{name: rows[name][end:] for name in rows}], len(rows["user"]) - end, last

    def events(self) -> tuple[Events, np.ndarray | None]:
        """All of it in memory, and what the events take back."""
        logs, others = zip(*self.chunks(), strict=True)
        lengths = np.concatenate([np.diff(log.user_offsets) for log in logs])
        whole = EventLog(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([log.item for log in logs]),
            np.concatenate([log.feedback for log in logs]),
            np.concatenate([log.time for log in logs]),
            None if logs[0].value is None else np.concatenate([log.value for log in logs]),
            len(self.item_ids),
        )
        undo = np.concatenate([other["takes_back"] for other in others]) if "takes_back" in others[0] else None
        return Events(whole, self.user_ids.to_pylist(), self.item_ids.to_pylist()), undo


def sort_log(
    reader: LogReader, sorter: LogSorter, items: ItemTable | None = None, known: Sequence[str] | None = None
) -> tuple[SortedLog, ItemTable]:
    """Reads and indexes a log.

    Items are numbered as in ``items``, then come those that only the log knows; without it the items are those of the
    log, or those ``known``, which have to be all. Users, and items without a table, are numbered in the order of
    (length, text) of their ids, which for integer ids is their numeric order. Events of one user and second keep the
    order of the source's finer times, then of the files' names and lines. Raises InputError.
    """
    reader.read(sorter)
    user_ids, item_ids = sorter.ids("user"), sorter.ids("item")
    if items is not None:
        items = _with_items_of(items, item_ids, reader)
        item_ids = pa.array(items.ids, pa.string())
    elif known is not None:
        unknown = item_ids.filter(pc.invert(pc.is_in(item_ids, pa.array(known, pa.string()))))
        if len(unknown):
            _refuse_unknown(unknown, reader)
        item_ids = pa.array(known, pa.string())
    log = SortedLog(sorter, user_ids, item_ids, min(reader.days), max(reader.days))
    return log, items or ItemTable(item_ids.to_pylist(), [""] * len(item_ids))


def _with_items_of(items: ItemTable, of_log: pa.StringArray, reader: LogReader) -> ItemTable:
    """The table, and after it the items that only the log knows: without text and attributes. InputError where the
    table knows none of the log's."""
    known = set(items.ids)
    new = sorted(item for item in of_log.to_pylist() if item not in known)
    if new and len(new) == len(of_log):
        item, where = reader.first_item
        raise InputError(
            f"{where}: {reader.mapping.item} {item!r} is not in the item table, nor is any other item of the log; the "
            f"table holds {', '.join(items.ids[:3])}, ..."
        )
    if new:
        reader.report(f"items: {len(new):,} of the log are not in the item table, and stay without text")
    return items.extended(new)


def _refuse_unknown(unknown: pa.StringArray, reader: LogReader) -> None:
    name, first = reader.mapping.item, ""

    def holds(source: Source) -> np.ndarray:
        nonlocal first
        column = encode(source, name)
        strings = to_strings(column)
        rows = column.rows(np.flatnonzero(pc.is_in(strings, unknown).to_numpy(zero_copy_only=False)))
        if len(rows):
            first = strings[int(column.codes[rows[0]])].as_py()
        return np.isin(np.arange(source.table.num_rows), rows[:1])

    where = reader.where(holds)
    raise InputError(f"{where}: {name} {first!r} is not in the item table ({len(unknown)} items of the log are not)")


@contextmanager
def scratch_sorter(beside: Path | None = None, memory: int | None = None) -> Iterator[LogSorter]:
    """A sorter whose folder lies in ``beside`` (None: where temporary files go), and goes with the context."""
    with TemporaryDirectory(prefix="sort-", dir=beside) as folder, LogSorter(Path(folder), memory) as sorter:
        yield sorter


def read_events(
    paths: Sequence[Path],
    mapping: EventMapping,
    report: Report,
    selection: Selection | None = None,
    items: ItemTable | None = None,
    known: Sequence[str] | None = None,
    *,
    whole: bool = True,
) -> tuple[Events, ItemTable]:
    """The events of a log that fits into memory, such as a day's; arguments and errors as for `sort_log`."""
    rules = (*mapping.dislike, *mapping.like) if whole else ()
    reader = LogReader(
        log_files(paths), read_file(mapping), mapping, report, selection or Selection(), time.time(), rules, whole
    )
    with scratch_sorter() as sorter:
        log, items = sort_log(reader, sorter, items, known)
        return log.events()[0], items
