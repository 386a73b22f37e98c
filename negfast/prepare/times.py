"""Times of events: seconds, milliseconds or microseconds since 1970, or ISO 8601."""

import re
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negfast.data.log import DAY
from negfast.errors import InputError
from negfast.prepare.readers import Source, first_failure

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
UNITS = ("auto", *PER_SECOND, "iso")


def read_times(
    source: Source, column: str, unit: str, report: Callable[[str], None], now: float | None = None
) -> tuple[np.ndarray, int]:
    """Times of a column as (ticks int64 [N], ticks per second); ticks keep the source's resolution.

    ``unit`` is one of UNITS; ``auto`` tells the unit by magnitude and says so. Typed timestamps and dates of
    Parquet need no unit. Raises InputError with the line for a time that is missing, does not parse, lies
    before 1970 or more than a day ahead of ``now`` (default: the clock).
    """
    values = source.table[column]
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if values.null_count:
        raise InputError(f"{source.where(pc.index(pc.is_null(values), True).as_py())}: no {column}")
    if pa.types.is_temporal(values.type):
        ticks, per_second = _from_timestamps(source, column, values)
    elif unit == "iso" or (unit == "auto" and _looks_iso(values)):
        ticks, per_second = _from_iso(source, column, values)
    else:
        ticks, per_second = _from_numbers(source, column, values, unit, report)
    _check_range(source, column, values, ticks, per_second, time.time() if now is None else now)
    return ticks, per_second


def _numpy(values: pa.ChunkedArray) -> np.ndarray:
    return values.to_numpy()


def _from_timestamps(source: Source, column: str, values: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    try:
        return _numpy(values.cast(pa.timestamp("us"), safe=False).cast(pa.int64())), PER_SECOND["us"]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{source.path}: {column} is a {values.type}, expected a timestamp or a number") from error


def _looks_iso(values: pa.ChunkedArray) -> bool:
    if not (len(values) and pa.types.is_string(values.type)):
        return False
    return bool(pc.match_substring_regex(values.slice(0, 1), r"^\s*\d{4}-\d{2}-\d{2}")[0].as_py())


def _from_iso(source: Source, column: str, values: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """Strings with an offset (Z, +02:00) are taken to UTC, strings without are UTC; one file has one kind."""
    if not pa.types.is_string(values.type):
        raise InputError(f"{source.path}: {column} is a {values.type}, expected ISO 8601 strings")
    zoned = len(values) and re.search(r"[T ].*(Z|[+-]\d{2}(:?\d{2})?)\s*$", values[0].as_py())
    kind = pa.timestamp("us", "UTC") if zoned else pa.timestamp("us")

    def parse(part: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.utf8_trim_whitespace(part).cast(kind)

    try:
        return _numpy(parse(values).cast(pa.int64())), PER_SECOND["us"]
    except pa.ArrowInvalid:
        row = first_failure(values, parse)
    expected = "ISO 8601 with an offset, like the first" if zoned else "ISO 8601 without offset, like the first"
    raise InputError(
        f"{source.where(row)}: {column} {values[row].as_py()!r} is no time, expected {expected if row else 'ISO 8601'}"
    )


def _parse_number(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """int64 where every value is an integer, else float64."""
    if pa.types.is_string(values.type):
        values = pc.utf8_trim_whitespace(values)
    if pa.types.is_integer(values.type) or pa.types.is_string(values.type):
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid:
            pass
    return values.cast(pa.float64())


def _from_numbers(
    source: Source, column: str, values: pa.ChunkedArray, unit: str, report: Callable[[str], None]
) -> tuple[np.ndarray, int]:
    try:
        numbers = _numpy(_parse_number(values))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        row = first_failure(values, _parse_number)
        expected = "a number" if unit != "auto" else "seconds, ms or us since 1970, or ISO 8601"
        raise InputError(
            f"{source.where(row)}: {column} {values[row].as_py()!r} is no time, expected {expected}"
        ) from None
    if unit == "auto" and len(numbers):
        unit = _unit_of_magnitude(float(np.median(numbers)))
        report(f"times: {column} taken as {unit} since 1970 by its magnitude (--time-unit sets it)")
    per_second = PER_SECOND.get(unit, 1)
    if numbers.dtype.kind == "f":
        if np.isnan(numbers).any():
            row = int(np.argmax(np.isnan(numbers)))
            raise InputError(f"{source.where(row)}: {column} {values[row].as_py()!r} is no time, expected a number")
        microseconds = np.rint(numbers * (PER_SECOND["us"] // per_second))
        return np.clip(microseconds, -1, 2.0**62).astype(np.int64), PER_SECOND["us"]
    return numbers, per_second


def _unit_of_magnitude(value: float) -> str:
    """1e11 s is the year 5138; 1e11 ms is 1973, 1e14 us likewise."""
    return "s" if value < 1e11 else "ms" if value < 1e14 else "us"


def _check_range(
    source: Source, column: str, values: pa.ChunkedArray, ticks: np.ndarray, per_second: int, now: float
) -> None:
    if not len(ticks):
        return
    if ticks.min() < 0:
        row = int(np.argmax(ticks < 0))
        raise InputError(f"{source.where(row)}: {column} {values[row]} lies before 1970")
    latest = int(now + DAY) * per_second
    if ticks.max() > latest:
        row = int(np.argmax(ticks > latest))
        raise InputError(f"{source.where(row)}: {column} {values[row]} lies in the future (is --time-unit right?)")
