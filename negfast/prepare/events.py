"""From a source's columns to the event log and the item table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from negfast.data.items import ItemTable
from negfast.data.log import DISLIKE, EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.prepare.readers import Encoded, Source, encode, read_table, to_floats, to_strings
from negfast.prepare.rules import Rule, feedback
from negfast.prepare.times import read_times

Report = Callable[[str], None]
REST = {"like": LIKE, "exposed": EXPOSED}


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
    time_unit: str = "auto"
    columns: tuple[str, ...] | None = None  # names of the columns of a file without header
    separator: str | None = None


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


def read_events(
    path: Path, mapping: EventMapping, item_ids: Sequence[str] | None, report: Report, now: float | None = None
) -> Events:
    """Reads, validates and indexes the event log.

    ``item_ids`` is the item table's order, which must hold every item of the log; without it the items are
    those of the log. Users, and items without a table, are numbered in the order of (length, text) of their
    ids, which for integer ids is their numeric order. Events of one user and second keep the order of the
    source's finer times, then of its lines. Raises InputError.
    """
    source = read_table(path, event_columns(mapping), names=mapping.columns, separator=mapping.separator)
    return index_events(source, mapping, item_ids, report, now)


def event_columns(mapping: EventMapping) -> list[str]:
    """The columns of the event file that the mapping names."""
    rules = (*mapping.dislike, *mapping.like)
    columns = [mapping.user, mapping.item, mapping.time, *(rule.column for rule in rules)]
    return columns + ([mapping.value] if mapping.value else [])


def index_events(
    source: Source,
    mapping: EventMapping,
    item_ids: Sequence[str] | None,
    report: Report,
    now: float | None = None,
    need_dislikes: bool = True,
) -> Events:
    """`read_events` of a table that is read already; a day of a log may do without dislikes."""
    path, rules = source.path, (*mapping.dislike, *mapping.like)
    if source.table.num_rows == 0:
        raise InputError(f"{path}: no events, expected at least one row")

    user, user_ids = _index(encode(source, mapping.user))
    item, item_ids = _index(encode(source, mapping.item), item_ids)
    ticks, per_second = read_times(source, mapping.time, mapping.time_unit, report, now)
    of_rule = {rule.column: encode(source, rule.column) for rule in rules}
    kinds = feedback(of_rule, mapping.dislike, mapping.like, EXPOSED if mapping.like else REST[mapping.rest])
    if need_dislikes and not (kinds == DISLIKE).any():
        raise InputError(f"{path}: no dislikes: {_no_dislikes(mapping.dislike, of_rule)}")
    value = None if mapping.value is None else _values(encode(source, mapping.value))

    order = _order(user, ticks, len(user_ids))
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    np.cumsum(np.bincount(user, minlength=len(user_ids)), out=offsets[1:])
    log = EventLog(
        offsets,
        item[order],
        kinds[order],
        ticks[order] // per_second,
        None if value is None else value[order],
        len(item_ids),
    )
    return Events(log, list(user_ids), list(item_ids))


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
    _check_ids(column)
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


def _check_ids(column: Encoded) -> None:
    if (column.codes < 0).any():
        raise InputError(f"{column.where(-1)}: no {column.name}, expected an id")


def _unique_ids(column: Encoded) -> list[str]:
    _check_ids(column)
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


def _values(column: Encoded) -> np.ndarray:
    """float32 [N], NaN where missing."""
    return np.append(to_floats(column, "value"), np.nan).astype(np.float32)[column.codes]


def _no_dislikes(rules: Sequence[Rule], columns: dict[str, Encoded]) -> str:
    rule = rules[0]
    values = sorted(map(str, columns[rule.column].values[:1000].to_pylist()))
    shown = ", ".join(values[:5]) + (", ..." if len(values) > 5 else "")
    return f"no event matches {' or '.join(map(str, rules))}; {rule.column} holds {shown or 'nothing'}"
