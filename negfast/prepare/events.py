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
from negfast.data.log import EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.prepare.readers import (
    BadRows,
    Encoded,
    Source,
    encode,
    file_columns,
    read_table,
    to_floats,
    to_strings,
)
from negfast.prepare.rules import Rule

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


def event_columns(mapping: EventMapping) -> list[str]:
    """The columns of the event file that the mapping names."""
    places = {"user": mapping.user, "item": mapping.item, "time": mapping.time}
    for name, column in places.items():
        if list(places.values()).count(column) > 1:
            raise InputError(f"--{name}-column {column!r}: found for two of user, item and time")
    rules = (*mapping.dislike, *mapping.like)
    columns = [mapping.user, mapping.item, mapping.time, *(rule.column for rule in rules)]
    return columns + [name for name in (mapping.value, mapping.community) if name]


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


def refuse_nulls(source: Source, column: str, rows: np.ndarray, bad: BadRows) -> None:
    """``rows`` have no id."""
    bad.add(source, rows, lambda row: f"no {column}, expected an id")


def _unique_ids(column: Encoded) -> list[str]:
    refuse_nulls(column.source, column.name, np.flatnonzero(column.codes < 0), BadRows())
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


def values_of(column: Encoded, bad: BadRows) -> np.ndarray:
    """float32 [N], NaN where missing."""
    return np.append(to_floats(column, "value", bad), np.nan).astype(np.float32)[column.codes]
