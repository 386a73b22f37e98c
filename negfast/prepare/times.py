"""Times of events: seconds, ms, us or ns since 1970, or ISO 8601."""

import itertools
import re
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negfast.data.log import DAY
from negfast.errors import InputError
from negfast.prepare.readers import BadRows, Source, failures

LEAST = {"ns": 1e17, "us": 1e14, "ms": 1e11, "s": 0.0}  # each is 1973; 1e11 s is the year 5138
LEAST_SECONDS = 1e8  # 1973: smaller numbers may be of any unit
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
UNITS = ("auto", *PER_SECOND, "iso")
HEAD = 100  # values that tell whether a column is ISO 8601


class Times:
    """The times of a log, block by block, in one format: what --time-unit leaves open, the first block tells."""

    def __init__(self, column: str, unit: str, report: Callable[[str], None]) -> None:
        """``unit`` is one of UNITS; ``auto`` tells the unit by magnitude and says so."""
        self.column, self.unit, self._report = column, unit, report
        self._told = False  # the unit was told by magnitude
        self.like: str | None = None  # the first ISO time

    def read(self, source: Source, bad: BadRows) -> tuple[np.ndarray, int]:
        """The times of a block as (ticks int64 [N], ticks per second); ticks keep the block's resolution.

        Typed timestamps and dates of Parquet need no unit. Raises InputError with the line for a time that is missing
        or does not parse; where ``bad`` skips rows, they go there and have time 0.
        """
        values = source.table[self.column]
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        missing = np.flatnonzero(pc.is_null(values).to_numpy())
        bad.add(source, missing, lambda row: f"no {self.column}")
        if len(missing):
            values = pc.fill_null(values, values.drop_null()[0] if len(missing) < len(values) else pa.scalar(0))
        if pa.types.is_temporal(values.type):
            return _from_timestamps(source, self.column, values)
        if self.unit in ("auto", "iso") and self.like is None:
            self.like = _first_iso(values)
        if self.unit == "iso" or (self.unit == "auto" and self.like is not None):
            self.unit = "iso"
            return _from_iso(source, self.column, values, self.like, bad)
        return self._from_numbers(source, values, bad)

    def _from_numbers(self, source: Source, values: pa.ChunkedArray, bad: BadRows) -> tuple[np.ndarray, int]:
        expected = "a number" if self.unit != "auto" else "seconds, ms, us or ns since 1970, or ISO 8601"
        zero = "0" if pa.types.is_string(values.type) else 0
        numbers = _parsed(source, self.column, values, _parse_number, expected, zero, bad).to_numpy()
        if self.unit == "auto" and len(numbers):
            self.unit, self._told = _unit_of_magnitude(float(np.median(numbers))), True
            self._report(f"times: {self.column} taken as {self.unit} since 1970 by its magnitude (--time-unit sets it)")
        if self._told:
            other = np.flatnonzero((numbers >= LEAST_SECONDS) & (numbers < LEAST[self.unit]))
            bad.add(
                source,
                other,
                lambda row: (
                    f"{self.column} {values[row].as_py()} is {_unit_of_magnitude(float(numbers[row]))} by its "
                    f"magnitude, most are {self.unit} (--time-unit {self.unit} takes it as such)"
                ),
            )
        per_second = PER_SECOND.get(self.unit, 1)
        if numbers.dtype.kind == "f":
            missing = np.flatnonzero(np.isnan(numbers))
            bad.add(source, missing, lambda row: f"{self.column} {values[row].as_py()!r} is no time, expected a number")
            microseconds = np.rint(np.nan_to_num(numbers, nan=0.0) * (PER_SECOND["us"] / per_second))
            return np.clip(microseconds, -1, 2.0**62).astype(np.int64), PER_SECOND["us"]
        return numbers, per_second


def nanoseconds(ticks: np.ndarray, per_second: int) -> np.ndarray:
    """Ticks that `check_times` has passed as nanoseconds, int64: the one resolution that blocks share."""
    return ticks * (PER_SECOND["ns"] // per_second)


def check_times(
    source: Source,
    column: str,
    ticks: np.ndarray,
    per_second: int,
    bad: BadRows | None = None,
    now: float | None = None,
) -> None:
    """Raises InputError with the line for a time before 1970 or over a day ahead of ``now`` (default: the clock)."""
    bad, values = bad or BadRows(), source.table[column]
    latest = int((time.time() if now is None else now) + DAY) * per_second
    bad.add(source, np.flatnonzero(ticks < 0), lambda row: f"{column} {values[row]} lies before 1970")
    ahead = "lies in the future (is --time-unit right?)"
    bad.add(source, np.flatnonzero(ticks > latest), lambda row: f"{column} {values[row]} {ahead}")


def _from_timestamps(source: Source, column: str, values: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    unit = values.type.unit if pa.types.is_timestamp(values.type) else "us"
    try:
        return values.cast(pa.timestamp(unit), safe=False).cast(pa.int64()).to_numpy(), PER_SECOND[unit]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{source.path}: {column} is a {values.type}, expected a timestamp or a number") from error


def _first_iso(values: pa.ChunkedArray) -> str | None:
    """The first of the head's values that looks like ISO 8601."""
    if not pa.types.is_string(values.type):
        return None
    head = values.slice(0, HEAD)
    dates = head.filter(pc.match_substring_regex(head, r"^\s*\d{4}-\d{2}-\d{2}"))
    return dates[0].as_py() if len(dates) else None


def _from_iso(
    source: Source, column: str, values: pa.ChunkedArray, first: str | None, bad: BadRows
) -> tuple[np.ndarray, int]:
    """Strings with an offset (Z, +02:00) are taken to UTC, strings without are UTC; a log has one kind, ``first``'s."""
    if not pa.types.is_string(values.type):
        raise InputError(f"{source.path}: {column} is a {values.type}, expected ISO 8601 strings")
    zoned = first is not None and re.search(r"[T ].*(Z|[+-]\d{2}(:?\d{2})?)\s*$", first)
    fine = bool(pc.any(pc.match_substring_regex(values, r"\.\d{7,9}")).as_py())
    unit = "ns" if fine else "us"  # nanoseconds end in 2262
    kind = pa.timestamp(unit, "UTC" if zoned else None)

    def parse(part: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.utf8_trim_whitespace(part).cast(kind)

    like = "" if first is None else f" {'with an' if zoned else 'without'} offset, like {first.strip()!r}"
    epoch = "1970-01-01T00:00:00Z" if zoned else "1970-01-01"
    return _parsed(source, column, values, parse, f"ISO 8601{like}", epoch, bad).cast(
        pa.int64()
    ).to_numpy(), PER_SECOND[unit]


def _parsed(
    source: Source,
    column: str,
    values: pa.ChunkedArray,
    parse: Callable[[pa.ChunkedArray], pa.ChunkedArray],
    expected: str,
    epoch: object,
    bad: BadRows,
) -> pa.ChunkedArray:
    """What ``parse`` makes of the values, and of ``epoch`` in the place of those that it fails at, which are bad."""
    try:
        return parse(values)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        wrong = failures(values, parse)
    rows = np.array(list(wrong if bad.skip else itertools.islice(wrong, 1)))
    bad.add(source, rows, lambda row: f"{column} {values[row].as_py()!r} is no time, expected {expected}")
    mask = np.zeros(len(values), bool)
    mask[rows] = True
    return parse(pc.if_else(pa.array(mask), pa.scalar(epoch, values.type), values))


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


def _unit_of_magnitude(value: float) -> str:
    return next((unit for unit, least in LEAST.items() if value >= least), "s")
