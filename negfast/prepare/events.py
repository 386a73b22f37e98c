"""From a source's columns to the event log and the item table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from negfast.data.dataset import date_of
from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.prepare.readers import (
    BadRows,
    Encoded,
    Source,
    encode,
    file_columns,
    join,
    read_table,
    to_floats,
    to_strings,
)
from negfast.prepare.rules import Rule, feedback
from negfast.prepare.times import check_times, read_times

Report = Callable[[str], None]
REST = {"like": LIKE, "exposed": EXPOSED}
STRAY_SHARE, STRAY_DAYS, STRAY_GAPS = 0.01, 30, 10  # see `_refuse_stray`


@dataclass(frozen=True)
class EventMapping:
    """Which columns of the event file mean what."""

    dislike: tuple[Rule, ...]
    like: tuple[Rule, ...] = ()
    rest: str = "like"  # what an event is that no rule matches, where there is no like rule: a key of REST
    user: str = "user"
    item: str = "item"
    time: str = "time"
    value: str | None = None
    community: str | None = None  # of --split-within, where it is a column of the events
    time_unit: str = "auto"
    columns: tuple[str, ...] | None = None  # names of the columns of a file without header
    separator: str | None = None


@dataclass(frozen=True)
class Selection:
    """Which rows and events of a log are left out; all that are, are counted."""

    skip_bad_rows: bool = False  # those that cannot be read; else the first one is an error
    drop_repeats: bool = False  # events that repeat an earlier one in every column
    first_day: int | None = None  # days since 1970, both inclusive
    last_day: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)  # filled while reading: what was left out, and how often

    def __post_init__(self) -> None:
        if self.first_day is not None and self.last_day is not None and self.first_day > self.last_day:
            raise InputError(
                f"--from {date_of(self.first_day)}: expected a day not after --until {date_of(self.last_day)}"
            )


@dataclass(frozen=True)
class ItemMapping:
    """Which columns of the item file mean what."""

    id: str = "item"
    text: str | None = None
    attributes: tuple[tuple[str, str], ...] = ()  # (column, separator inside the value, "" for none)
    columns: tuple[str, ...] | None = None
    separator: str | None = None


@dataclass(frozen=True)
class Events:
    """The event log with the external ids of its users and items, in index order."""

    log: EventLog
    user_ids: list[str]
    item_ids: list[str]
    community: np.ndarray | None = None  # object [N], the community of every event, where the log is split within them


def read_events(
    paths: Sequence[Path],
    mapping: EventMapping,
    items: ItemTable | None,
    report: Report,
    selection: Selection | None = None,
    now: float | None = None,
) -> tuple[Events, ItemTable]:
    """Reads, validates and indexes the event log, whose files have the same columns.

    Items are numbered as in ``items``, then come those that only the log knows; without it the items are those of the
    log. Users, and items without a table, are numbered in the order of (length, text) of their ids, which for integer
    ids is their numeric order. Events of one user and second keep the order of the source's finer times, then of its
    lines. Raises InputError.
    """
    source = read_source(paths, mapping, report, selection, now)
    if items is not None:
        items = with_items_of(items, source, mapping, report)
    ids = None if items is None else items.ids
    events = index_events(source, mapping, ids, report, selection, now, must_hold=(*mapping.dislike, *mapping.like))
    return events, items or items_of_log(events)


def read_source(
    paths: Sequence[Path],
    mapping: EventMapping,
    report: Report,
    selection: Selection | None = None,
    now: float | None = None,
) -> Source:
    """The rows of the event files that ``selection`` leaves, still as they stand there. Raises InputError."""
    bad = BadRows(selection is not None and selection.skip_bad_rows)
    columns = event_columns(mapping)
    source = join([read_table(p, columns, names=mapping.columns, separator=mapping.separator, bad=bad) for p in paths])
    return select_rows(source, mapping, report, bad, selection, now)


def select_rows(
    source: Source,
    mapping: EventMapping,
    report: Report,
    bad: BadRows,
    selection: Selection | None = None,
    now: float | None = None,
) -> Source:
    """``source`` without the days and the bad rows that ``selection`` leaves out; ``bad`` has what reading skipped."""
    if source.table.num_rows == 0 and not bad.count:
        raise InputError(f"{source.path}: no events, expected at least one row")
    selection = selection or Selection()
    first, last = selection.first_day, selection.last_day
    if first is not None or last is not None:
        ticks, per_second = read_times(source, mapping.time, mapping.time_unit, lambda _: None, bad)
        day = ticks // per_second // DAY
        early = np.zeros(len(day), bool) if first is None else day < first
        late = np.zeros(len(day), bool) if last is None else day > last
        kept = ~(early | late)
        kept[list(bad.rows)] = True  # whose day is not known
        bad.rows = {}
        source = source.take(np.flatnonzero(kept))
        selection.left_out.update(before_from=int(early.sum()), after_until=int(late.sum()))
        report(f"days: left out {early.sum():,} events before --from and {late.sum():,} after --until")
    if selection.skip_bad_rows:
        _columns(source, mapping, bad, lambda _: None, now)
        source = bad.remove(source)
        selection.left_out["bad_rows"] = bad.count
        report(f"bad rows: {bad.count:,} skipped, {source.table.num_rows:,} rows left" + (":" if bad.count else ""))
        for line in bad.first:
            report(f"  {line}")
    if source.table.num_rows == 0:
        raise InputError(f"{source.path}: no events are left, expected at least one")
    return source


def event_columns(mapping: EventMapping) -> list[str]:
    """The columns of the event file that the mapping names."""
    places = {"user": mapping.user, "item": mapping.item, "time": mapping.time}
    for name, column in places.items():
        if list(places.values()).count(column) > 1:
            raise InputError(f"--{name}-column {column!r}: found for two of user, item and time")
    rules = (*mapping.dislike, *mapping.like)
    columns = [mapping.user, mapping.item, mapping.time, *(rule.column for rule in rules)]
    return columns + [name for name in (mapping.value, mapping.community) if name]


@dataclass(frozen=True)
class _Columns:
    """The columns of an event log, in the order of its rows."""

    user: Encoded
    item: Encoded
    ticks: np.ndarray  # int64 [N]
    per_second: int
    feedback: np.ndarray  # uint8 [N]
    of_rule: dict[str, Encoded]
    value: np.ndarray | None  # float32 [N]
    community: np.ndarray | None  # object [N]


def _columns(
    source: Source,
    mapping: EventMapping,
    bad: BadRows,
    report: Report,
    now: float | None,
    must_hold: Sequence[Rule] = (),
) -> _Columns:
    """Reads every column. Raises InputError for the first bad row, or gives bad rows to ``bad`` if that skips them."""
    user, item = encode(source, mapping.user), encode(source, mapping.item)
    for column in (user, item):
        _check_ids(column, bad)
        to_strings(column, bad)
    ticks, per_second = read_times(source, mapping.time, mapping.time_unit, report, bad)
    check_times(source, mapping.time, ticks, per_second, bad, now)
    of_rule = {rule.column: encode(source, rule.column) for rule in (*mapping.dislike, *mapping.like)}
    rest = EXPOSED if mapping.like else REST[mapping.rest]
    kinds = feedback(of_rule, mapping.dislike, mapping.like, rest, bad, must_hold)
    value = None if mapping.value is None else _values(encode(source, mapping.value), bad)
    community = None
    if mapping.community is not None:
        column = encode(source, mapping.community)
        community = np.array(_take(to_strings(column).to_pylist(), column.codes, ""), object)
    return _Columns(user, item, ticks, per_second, kinds, of_rule, value, community)


def index_events(
    source: Source,
    mapping: EventMapping,
    item_ids: Sequence[str] | None,
    report: Report,
    selection: Selection | None = None,
    now: float | None = None,
    *,
    must_hold: Sequence[Rule] = (),
    whole: bool = True,
) -> Events:
    """The events of the rows that `read_source` gives.

    A ``whole`` log has dislikes and likes, a day may do without; each rule of ``must_hold`` holds for some event.
    Raises InputError.
    """
    columns = _columns(source, mapping, BadRows(), report, now, must_hold)
    if whole:
        _refuse_without(columns, mapping, report)
    _refuse_stray(source, columns, selection or Selection())
    user, user_ids = _index(columns.user)
    item, item_ids = _index(columns.item, item_ids)
    ticks, value = columns.ticks, columns.value
    order = _order(user, ticks, len(user_ids))
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    np.cumsum(np.bincount(user, minlength=len(user_ids)), out=offsets[1:])
    log = EventLog(
        offsets,
        item[order],
        columns.feedback[order],
        ticks[order] // columns.per_second,
        None if value is None else value[order],
        len(item_ids),
    )
    community = None if columns.community is None else columns.community[order]
    return Events(log, list(user_ids), list(item_ids), community)


def _refuse_without(columns: _Columns, mapping: EventMapping, report: Report) -> None:
    """InputError for a log without dislikes or likes, unless it was said that it has no likes."""
    path, has = columns.user.source.path, np.bincount(columns.feedback, minlength=4) > 0
    dislike, like = (" or ".join(map(str, rules)) for rules in (mapping.dislike, mapping.like))
    held = "; ".join(f"{name} holds {column.commonest()}" for name, column in columns.of_rule.items())
    if not has[DISLIKE]:
        raise InputError(f"{path}: no dislikes: no event matches {dislike}; {held}")
    if has[LIKE]:
        return
    if like:
        raise InputError(f"{path}: no likes: no event matches {like} and is no dislike; {held}")
    if mapping.rest == "like":
        raise InputError(f"{path}: no likes: every event matches {dislike}; {held}")
    report("warning: no likes (--rest exposed without --like-rule): nothing to tell dislikes from")


def _refuse_stray(source: Source, columns: _Columns, selection: Selection) -> None:
    """InputError for a date far from the others, which would stretch the log and its split.

    At either end at most STRAY_SHARE of the events, more than STRAY_DAYS days and STRAY_GAPS times the longest gap of
    the others away, are stray (negfast's choice), unless --from or --until say that they are not.
    """
    of_event = columns.ticks // columns.per_second // DAY
    counts = np.bincount(of_event)
    day = np.flatnonzero(counts)
    counts = counts[day]
    few = int(STRAY_SHARE * len(of_event))
    low, high = (int(np.searchsorted(np.cumsum(c), few, side="right")) for c in (counts, counts[::-1]))
    high = len(day) - high  # days before day[low] and from day[high] on may be stray
    if low >= high:
        return
    gaps = np.diff(day)
    far = max(STRAY_DAYS, STRAY_GAPS * int(gaps[low : high - 1].max(initial=1)))
    early, late = np.flatnonzero(gaps[:low] > far), np.flatnonzero(gaps[high - 1 :] > far) + high - 1
    if len(early) and selection.first_day is None:
        keep, stray = f"--from {date_of(day[early[-1] + 1])}", of_event <= day[early[-1]]
    elif len(late) and selection.last_day is None:
        keep, stray = f"--until {date_of(day[late[0]])}", of_event > day[late[0]]
    else:
        return
    row = int(np.argmax(stray))
    raise InputError(
        f"{source.where(row)}: {date_of(of_event[row])} is far from the other dates ({stray.sum():,} of "
        f"{len(stray):,} events are); {keep} leaves such events out"
    )


def read_items(path: Path, mapping: ItemMapping, embedding: Path | None = None, encoding: str = "utf-8") -> ItemTable:
    """Reads and validates the item table; the row order of the file is kept. Raises InputError."""
    columns = [mapping.id, *([mapping.text] if mapping.text else []), *(name for name, _ in mapping.attributes)]
    source = read_table(
        path, columns, names=mapping.columns, separator=mapping.separator, multiline=True, encoding=encoding
    )
    if source.table.num_rows == 0:
        raise InputError(f"{path}: no items, expected at least one row")
    ids = _unique_ids(encode(source, mapping.id))
    text = [""] * len(ids)
    if mapping.text:
        column = encode(source, mapping.text)
        text = _take(to_strings(column).to_pylist(), column.codes, "")
    attributes = {name: _attribute(source, name, separator) for name, separator in mapping.attributes}
    return ItemTable(ids, text, attributes, None if embedding is None else read_embedding(embedding, len(ids)))


def read_column(path: Path, mapping: ItemMapping, name: str) -> dict[str, str] | None:
    """The value of a column for every item of an item file, "" where it has none; None without such a column."""
    if name not in (mapping.columns or file_columns(path, mapping.separator)):
        return None
    source = read_table(path, [mapping.id, name], names=mapping.columns, separator=mapping.separator, multiline=True)
    column = encode(source, name)
    values = _take(to_strings(column).to_pylist(), column.codes, "")
    return dict(zip(_unique_ids(encode(source, mapping.id)), values, strict=True))


def check_column(path: Path, items: Path | None, mapping: EventMapping, name: str) -> None:
    """InputError where the event file at ``path`` has no column ``name`` for --split-within."""
    present = mapping.columns or file_columns(path, mapping.separator)
    if name not in present:
        where = path if items is None else f"{items} and {path}"
        raise InputError(f"{where}: no column {name!r} for --split-within; the events have {', '.join(present)}")


def with_attributes(mapping: ItemMapping, path: Path, given: Sequence[str]) -> ItemMapping:
    """The mapping with the attributes COLUMN[:SEPARATOR] of ``given``; the columns of the item file at ``path`` tell
    which colon ends the name. Raises InputError for an attribute that is there twice."""
    if not given:
        return mapping
    present = mapping.columns or file_columns(path, mapping.separator)
    attributes: dict[str, str] = {}
    for text in given:
        ends = [len(text), *(i for i in reversed(range(len(text))) if text[i] == ":")]
        name = next((text[:end] for end in ends if text[:end] in present), text.partition(":")[0])
        if name in attributes:
            raise InputError(f"--item-attributes {name}: is there twice")
        attributes[name] = text[len(name) + 1 :]
    return replace(mapping, attributes=tuple(attributes.items()))


def with_items_of(items: ItemTable, source: Source, mapping: EventMapping, report: Report) -> ItemTable:
    """The table, and after it the items that only the log knows: without text and attributes. InputError where the
    table knows none of the log's."""
    column = encode(source, mapping.item)
    of_log, known = to_strings(column).to_pylist(), set(items.ids)
    new = sorted({item for item in of_log if item not in known})
    if new and len(new) == len(of_log):
        raise InputError(
            f"{column.where(0)}: {mapping.item} {of_log[0]!r} is not in the item table, nor is any other item of the "
            f"log; the table holds {', '.join(items.ids[:3])}, ..."
        )
    if new:
        report(f"items: {len(new):,} of the log are not in the item table, and stay without text")
    return items.extended(new)


def items_of_log(events: Events) -> ItemTable:
    """The item table where no file gives one: ids of the log, no text."""
    return ItemTable(events.item_ids, [""] * len(events.item_ids))


def read_embedding(path: Path, n_items: int) -> np.ndarray:
    """float32 [I, D], row i for item i, from .npy, .safetensors (one tensor) or Parquet (one list column)."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        embedding = _read_embedding(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as an embedding: {' '.join(str(error).split())}") from error
    if embedding.ndim != 2 or len(embedding) != n_items:
        raise InputError(f"{path}: shape {list(embedding.shape)}, expected one row for each of {n_items} items")
    if embedding.dtype.kind not in "fiu":
        raise InputError(f"{path}: values are {embedding.dtype}, expected numbers")
    embedding = embedding.astype(np.float32)
    finite = np.isfinite(embedding).all(1)
    if not finite.all():
        raise InputError(f"{path}, row {int(np.argmin(finite)) + 1}: the embedding is not finite")
    return embedding


def _read_embedding(path: Path) -> np.ndarray:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = list(load_file(path).values())
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        if len(tensors) != 1:
            raise ValueError(f"it holds {len(tensors)} tensors, expected one")
        return tensors[0]
    if suffix in (".parquet", ".pq"):
        table = parquet.read_table(path)
        lists = [c for c in table.columns if pa.types.is_list(c.type) or pa.types.is_fixed_size_list(c.type)]
        if len(lists) != 1:
            raise ValueError(f"it has {len(lists)} list columns, expected one")
        flat = pc.list_flatten(lists[0]).to_numpy()
        return flat.reshape(table.num_rows, -1)
    raise ValueError(f"unknown format {suffix!r}, expected .npy, .safetensors or .parquet")


def _index(column: Encoded, ids: Sequence[str] | None = None) -> tuple[np.ndarray, Sequence[str]]:
    """Index of every event's user or item (int32 [N]) into ``ids``, or into the sorted ids of the column."""
    strings = to_strings(column)
    if ids is None:
        keys = pa.table({"length": pc.utf8_length(strings), "text": strings})
        order = pc.sort_indices(keys, [("length", "ascending"), ("text", "ascending")]).to_numpy()
        index = np.empty(len(order), np.int32)
        index[order] = np.arange(len(order), dtype=np.int32)
        return index[column.codes], strings.take(pa.array(order)).to_pylist()
    index = pc.index_in(strings, pa.array(ids, pa.string())).fill_null(-1).to_numpy(zero_copy_only=False)
    unknown = np.flatnonzero(index < 0)
    if len(unknown):
        code = int(column.codes[np.argmax(np.isin(column.codes, unknown))])
        raise InputError(
            f"{column.where(code)}: {column.name} {strings[code].as_py()!r} is not in the item table "
            f"({len(unknown)} items of the log are not)"
        )
    return index.astype(np.int32)[column.codes], ids


def _order(user: np.ndarray, ticks: np.ndarray, n_users: int) -> np.ndarray:
    """The stable order by (user, time)."""
    low, span = ticks.min(), int(ticks.max() - ticks.min()) + 1
    if n_users * span >= 2**63:
        return np.lexsort((ticks, user))
    return np.argsort(user * np.int64(span) + (ticks - low), kind="stable")  # one sort is 3x as fast as two


def _check_ids(column: Encoded, bad: BadRows) -> None:
    bad.add(column.source, np.flatnonzero(column.codes < 0), lambda row: f"no {column.name}, expected an id")


def _unique_ids(column: Encoded) -> list[str]:
    _check_ids(column, BadRows())
    if len(column.values) < len(column.codes):
        first = np.unique(column.codes, return_index=True)[1]
        again = np.ones(len(column.codes), bool)
        again[first] = False
        row = int(np.argmax(again))
        code = column.codes[row]
        raise InputError(
            f"{column.source.where(row)}: {column.name} {column.values[code].as_py()!r} is there twice, "
            f"first in {column.where(code)}"
        )
    return to_strings(column).take(pa.array(column.codes)).to_pylist()


def _take(values: list, codes: np.ndarray, missing: object) -> list:
    return [values[code] if code >= 0 else missing for code in codes.tolist()]


def _attribute(source: Source, name: str, separator: str) -> list[tuple[str, ...]]:
    """The values of each item: a list column as it is, a text split at ``separator``."""
    kind = source.table[name].type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [tuple(map(str, values or ())) for values in source.table[name].to_pylist()]
    column = encode(source, name)
    fractions = pa.types.is_floating(column.values.type)  # which no id may have, but a price
    texts = column.values.cast(pa.string()) if fractions else to_strings(column)
    split = [
        tuple(part.strip() for part in (value.split(separator) if separator else [value]) if part.strip())
        for value in texts.to_pylist()
    ]
    return _take(split, column.codes, ())


def _values(column: Encoded, bad: BadRows) -> np.ndarray:
    """float32 [N], NaN where missing."""
    return np.append(to_floats(column, "value", bad), np.nan).astype(np.float32)[column.codes]
