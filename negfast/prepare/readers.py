"""Tables from Parquet, CSV, TSV, `::`-separated and JSON Lines files, plain or compressed (.gz, .zst).

Text formats are read as strings and converted here, so that ids keep their leading zeros and a value
that does not convert is named with its line. A null is a null in every format: see NULLS.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.json as arrow_json
import pyarrow.parquet as parquet

from negfast.errors import InputError
from negfast.files import check_input_file

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".dat": "::"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
DATA_SUFFIXES = (*PARQUET, *SEPARATORS, *JSON_LINES)
FOREIGN = {  # how files start that are no text, and what to do about them
    b"PAR1": "Parquet; name it .parquet",
    b"\x1f\x8b": "compressed by gzip; name it .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; name it .zst",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or export it as CSV",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
NULLS = ("", "null", "nan", "-nan", "none", "na", "n/a", "#n/a", "<na>", "nat", "\\n")  # in lower case, of any text
SHOWN = 10  # bad rows that are shown
JSON_HEAD, JSON_BLOCK = 200, 1 << 24  # lines whose types are looked at; bytes parsed at once, no line may be longer
BLOCK_BYTES, BLOCK_ROWS = 1 << 24, 1 << 18  # of a block of an event file: text, Parquet
NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Text:
    """Whole lines of a text file, decompressed."""

    path: Path
    content: pa.Buffer
    lines_before: int = 0

    def line(self, row: int) -> int:
        """The line (from 1) of the row-th line that is not empty; rows count from 0, empty lines are no rows."""
        rows = -1
        for number, line in enumerate(io.BytesIO(self.content), self.lines_before + 1):
            rows += bool(line.strip(b"\r\n"))
            if rows == row:
                return number
        return self.lines_before + row + 1


@dataclass(frozen=True)
class Source:
    """The requested columns of a file or of a block of it, and where its rows are."""

    path: Path
    table: pa.Table
    text: Text | None = None  # None for Parquet
    before: int = 0  # rows of the file, or lines of the text, before the first row

    def take(self, rows: np.ndarray) -> "Source":
        """The rows at ``rows`` (int64, ascending), which keep their places in the file."""
        kept = np.zeros(self.table.num_rows, bool)
        kept[rows] = True
        return Taken(self.path, self.table.filter(pa.array(kept)), self.text, of=self, rows=rows)

    def where(self, row: int) -> str:
        """``file, line 7`` (text) or ``file, row 7`` (Parquet), both from 1, for row ``row`` from 0."""
        if self.text is None:
            return f"{self.path}, row {self.before + row + 1}"
        return f"{self.path}, line {self.text.line(self.before + row)}"


@dataclass(frozen=True)
class Taken(Source):
    """Some rows of another source."""

    of: Source = field(kw_only=True)
    rows: np.ndarray = field(kw_only=True)  # int64 [N]

    def where(self, row: int) -> str:
        return self.of.where(int(self.rows[row]))


@dataclass
class BadRows:
    """What becomes of rows that cannot be read: the first one is an error, or all are skipped and counted."""

    skip: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)  # at most SHOWN lines
    rows: dict[int, Callable[[int], str]] = field(default_factory=dict)  # of the source at work: row -> what is wrong

    def add(self, source: Source, rows: np.ndarray, message: Callable[[int], str]) -> None:
        """Rows (int, ascending) of ``source`` that are bad, and what is wrong with each. InputError unless skipped."""
        if len(rows) and not self.skip:
            raise InputError(f"{source.where(int(rows[0]))}: {message(int(rows[0]))}")
        for row in rows.tolist():
            self.rows.setdefault(row, message)

    def remove(self, source: Source) -> Source:
        """``source`` without the rows that were added, which are counted."""
        if not self.rows:
            return source
        bad = sorted(self.rows)
        self.tell(len(bad), (f"{source.where(row)}: {self.rows[row](row)}" for row in bad))
        self.rows = {}
        return source.take(np.delete(np.arange(source.table.num_rows), bad))

    def tell(self, count: int, lines: Iterator[str]) -> None:
        self.count += count
        self.first += itertools.islice(lines, SHOWN - len(self.first))


@dataclass(frozen=True)
class Encoded:
    """A column as codes into its distinct values: work on values is done once a value, not once a row."""

    source: Source
    name: str
    codes: np.ndarray  # int32 [N], -1 where the column is null: see NULLS
    values: pa.Array  # [V], no nulls

    def where(self, code: int) -> str:
        """The place of the first row with this code."""
        return self.source.where(int(np.argmax(self.codes == code)))

    def rows(self, codes: np.ndarray) -> np.ndarray:
        """The rows that have one of these codes, ascending."""
        return np.flatnonzero(np.isin(self.codes, codes))

    def value(self, row: int) -> object:
        """The value at a row that is not null."""
        return self.values[int(self.codes[row])].as_py()

    def counts(self) -> dict[object, int]:
        """How many rows have each value."""
        counts = np.bincount(self.codes[self.codes >= 0], minlength=len(self.values))
        return dict(zip(self.values.to_pylist(), counts.tolist(), strict=True))


def read_table(
    path: Path,
    columns: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    separator: str | None = None,
    multiline: bool = False,
    encoding: str = "utf-8",
) -> Source:
    """Reads ``columns`` of a file whose format its suffix tells.

    ``names`` are the columns of a text file without header; ``separator`` makes any suffix a separated text;
    ``multiline`` allows line breaks in quoted values; ``encoding`` is that of separated text. Raises InputError: file
    missing, unreadable or empty, column missing, wrong encoding, a line with too few or too many fields, or one that
    is no JSON object.
    """
    _check_file(path)
    wanted, split_at = list(dict.fromkeys(columns)), _format(path, separator)
    if split_at == "parquet":
        return Source(path, pa.concat_tables([block.table for block, _ in _parquet_blocks(path, wanted)]))
    text, _ = next(_texts(path, None))
    if split_at == "json":
        return _parse_json_text(text, wanted, _json_types(text, wanted))
    if encoding != "utf-8":
        text = replace(text, content=pa.py_buffer(text.content.to_pybytes().decode(encoding).encode("utf-8")))
    header = list(names) if names else _header(text, split_at)
    _check_header(path, wanted, header, names is not None)
    return _parse_separated(text, wanted, header, split_at, int(names is None), multiline)


def read_blocks(
    path: Path,
    columns: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    separator: str | None = None,
    bad: BadRows,
) -> Iterator[tuple[Source, int]]:
    """The file in blocks of bounded size, each with how many of the file's bytes are read by its end.

    Arguments and errors as for `read_table`; lines that cannot be parsed go to ``bad`` where it skips them. A line has
    no line breaks in quoted values.
    """
    _check_file(path)
    wanted, split_at = list(dict.fromkeys(columns)), _format(path, separator)
    if split_at == "parquet":
        yield from _parquet_blocks(path, wanted)
        return
    skipping, header, types = bad if bad.skip else None, list(names or ()), None
    for text, done in _texts(path, BLOCK_BYTES):
        first, lost = text.lines_before == 0, NO_ROWS
        kept = text
        if skipping:
            kept, lost = _without_lines(text, _no_object if split_at == "json" else _not_utf8, skipping)
        if not first and not kept.content.to_pybytes().strip():
            continue
        if split_at == "json":
            types = types or _json_types(kept, wanted)
            yield _parse_json_text(kept, wanted, types, text, lost), done
            continue
        header = header or _header(kept, split_at)
        if first:
            _check_header(path, wanted, header, bool(names))
        names_line = int(first and not names)
        yield _parse_separated(kept, wanted, header, split_at, names_line, False, text, lost, skipping), done


def _check_file(path: Path) -> None:
    check_input_file(path)
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")


def file_columns(path: Path, separator: str | None = None) -> list[str]:
    """The column names of a Parquet file, or of a text file's first line or object. Raises InputError."""
    _check_file(path)
    suffix = format_suffix(path)
    if separator is None and suffix in PARQUET:
        try:
            return parquet.read_schema(path).names
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read as Parquet: {_one_line(error)}") from error
    text, _ = next(_texts(path, BLOCK_BYTES))
    if separator is None and suffix in JSON_LINES:
        return list(_first_object(text))
    return _header(text, separator or SEPARATORS.get(suffix, ","))


def encode(source: Source, name: str) -> Encoded:
    """A column as codes into its distinct values."""
    chunks = source.table[name]
    if pa.types.is_nested(chunks.type):
        raise InputError(f"{source.path}: column {name!r} is a {chunks.type}, expected a string or number")
    if pa.types.is_dictionary(chunks.type):
        chunks = chunks.cast(chunks.type.value_type)
    encoded = chunks.dictionary_encode()  # one dictionary for all chunks
    if encoded.num_chunks == 0:
        return Encoded(source, name, np.empty(0, np.int32), pa.array([], chunks.type))
    values = encoded.chunk(0).dictionary
    codes = np.concatenate([c.indices.fill_null(-1).to_numpy(zero_copy_only=False) for c in encoded.chunks])
    codes = codes.astype(np.int32, copy=False)
    missing = _nulls(values)
    if missing.any():
        renumber = np.where(missing, -1, np.cumsum(~missing) - 1).astype(np.int32)
        codes = np.append(renumber, np.int32(-1))[codes]
        values = values.filter(pa.array(~missing))
    return Encoded(source, name, codes, values)


def to_strings(column: Encoded, bad: BadRows | None = None) -> pa.Array:
    """The distinct values as strings, [V]: how external ids are kept, whatever their type in the file.

    Numbers that are no id are errors, or go to ``bad`` where it skips them, and have any string then."""
    values = column.values
    if pa.types.is_floating(values.type):  # pandas turns integer ids with gaps into floats
        whole = pc.and_(pc.equal(pc.floor(values), values), pc.is_finite(values)).to_numpy(zero_copy_only=False)
        (bad or BadRows()).add(
            column.source,
            column.rows(np.flatnonzero(~whole)),
            lambda row: f"{column.name} {column.value(row)} is no id, expected a string or integer",
        )
        values = pc.if_else(pa.array(whole), values, 0.0).cast(pa.int64())
    try:
        strings = values.cast(pa.string())
        strings.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{column.source.path}: column {column.name!r} is not UTF-8: {error}") from error
    return strings


def to_floats(column: Encoded, what: str, bad: BadRows | None = None) -> np.ndarray:
    """The distinct values as finite float64 [V]; ``what`` names them in the error.

    Where ``bad`` skips rows, those whose value is no finite number go there and have NaN."""
    numbers = numbers_of(column.values)
    finite = np.isfinite(numbers)
    (bad or BadRows()).add(
        column.source,
        column.rows(np.flatnonzero(~finite)),
        lambda row: f"{what}: {column.name} {column.value(row)!r} is not a number",
    )
    return np.where(finite, numbers, np.nan)


def numbers_of(values: pa.Array) -> np.ndarray:
    """The values as float64 [V], NaN for what is no number."""
    try:
        return values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return np.array([_number(value) for value in values.to_pylist()])


def _number(value: object) -> float:
    """NaN for what Arrow does not take for a number either."""
    try:
        return pa.scalar(value).cast(pa.float64()).as_py()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return np.nan


def failures(array: pa.Array | pa.ChunkedArray, convert: Callable[[pa.Array], object], first: int = 0) -> Iterator[int]:
    """The indices at which ``convert``, which works element by element, fails, ascending; ``first`` is added."""
    try:
        convert(array)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if len(array) <= 1:
            yield first
            return
        middle = len(array) // 2
        yield from failures(array.slice(0, middle), convert, first)
        yield from failures(array.slice(middle), convert, first + middle)


def check_columns(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    """Raises InputError for a wanted column that is missing or there twice."""
    for name in wanted:
        if name not in present:
            close = get_close_matches(name, present, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise InputError(f"{path}: no column {name!r}, found {', '.join(present)}{hint}")
        if list(present).count(name) > 1:
            raise InputError(f"{path}: column {name!r} is there twice")


def format_suffix(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _nulls(values: pa.Array) -> np.ndarray:
    if pa.types.is_floating(values.type):
        return pc.is_nan(values).to_numpy(zero_copy_only=False)
    if pa.types.is_string(values.type):
        words = pc.utf8_lower(pc.utf8_trim_whitespace(values))
        return pc.is_in(words, pa.array(NULLS)).to_numpy(zero_copy_only=False)
    return np.zeros(len(values), bool)


def _format(path: Path, separator: str | None) -> str:
    """ "parquet", "json", or where a line of separated text is split. Raises InputError."""
    suffix = format_suffix(path)
    if separator is None and suffix in PARQUET:
        return "parquet"
    if separator is None and suffix in JSON_LINES:
        return "json"
    separator = separator or SEPARATORS.get(suffix)
    if separator is None:
        known = ", ".join(DATA_SUFFIXES)
        raise InputError(f"{path}: unknown format {suffix!r}, expected one of {known} (or give --separator)")
    return separator


def _parquet_blocks(path: Path, wanted: list[str]) -> Iterator[tuple[Source, int]]:
    try:
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        check_columns(path, wanted, file.schema_arrow.names)
        before, rows, size = 0, file.metadata.num_rows, path.stat().st_size
        empty = file.schema_arrow.empty_table().select(wanted)
        if rows == 0:
            yield Source(path, _plain_strings(empty)), size
        for batch in file.iter_batches(BLOCK_ROWS, columns=wanted):
            table = _plain_strings(pa.Table.from_batches([batch]).select(wanted))
            yield Source(path, table, before=before), size * (before + len(batch)) // rows
            before += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {_one_line(error)}") from error


def _plain_strings(table: pa.Table) -> pa.Table:
    """Strings of any width and layout, as polars and others write them, as Arrow's plain ones."""
    for number, column in enumerate(table.schema):
        if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
            table = table.set_column(number, column.name, table[column.name].cast(pa.string()))
    return table


def _texts(path: Path, size: int | None) -> Iterator[tuple[Text, int]]:
    """The lines of a file in blocks of about ``size`` bytes (None: in one), at least one, each with the place in the
    file where reading it ended."""
    compression = COMPRESSION.get(path.suffix.lower())
    rest, lines = b"", 0
    try:
        with (
            pa.OSFile(str(path)) as file,
            nullcontext(file) if compression is None else pa.CompressedInputStream(file, compression) as stream,
        ):
            for number in itertools.count():
                part = stream.read(size)
                data = rest + part
                if number == 0:
                    _refuse_foreign(path, data)
                last = size is None or not part
                end = len(data) if last else data.rfind(b"\n") + 1
                rest = data[end:]
                if end or (last and lines == 0):
                    yield Text(path, pa.py_buffer(data[:end]), lines), file.tell()
                    lines += data.count(b"\n", 0, end)
                if last:
                    return
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read: {_one_line(error)}") from error


def _refuse_foreign(path: Path, data: bytes) -> None:
    for magic, what in FOREIGN.items():
        if data.startswith(magic):
            raise InputError(f"{path}: found {what}")


def _check_utf8(text: Text) -> None:
    data = text.content.to_pybytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text.lines_before + data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{text.path}, line {line}: not UTF-8: byte 0x{data[error.start]:02x}") from error


def _check_header(path: Path, wanted: list[str], header: list[str], given: bool) -> None:
    """Raises InputError where a wanted column is missing or there twice; ``given``: --columns names them."""
    if not given and not set(wanted) & set(header):
        other = next((s for s in (";", "\t", "|", ",") if len(header) == 1 and s in header[0]), None)
        hint = f"is the separator {other!r}?" if other else "a file without header needs --columns"
        raise InputError(f"{path}: no column {wanted[0]!r}, found {', '.join(header) or 'an empty line'} ({hint})")
    check_columns(path, wanted, header)


def _parse_separated(
    text: Text,
    wanted: list[str],
    names: Sequence[str],
    separator: str,
    header: int,
    multiline: bool,
    whole: Text | None = None,
    lost: np.ndarray = NO_ROWS,
    skipping: BadRows | None = None,
) -> Source:
    """``names`` are those of the columns; ``header`` lines, 0 or 1, stand before the first row. ``text`` is ``whole``
    without its rows ``lost``."""
    path, content, whole = text.path, text.content, whole or text
    quote: str | bool = '"'
    if len(separator.encode()) > 1:  # Arrow splits at one byte: a control character that the text lacks stands in
        data = content.to_pybytes()
        stand_in = next((chr(c) for c in range(1, 32) if chr(c) not in "\t\n\r" and bytes([c]) not in data), None)
        if stand_in is None:
            raise InputError(f"{path}: cannot be split at {separator!r}: the file holds every control character")
        content = pa.py_buffer(data.replace(separator.encode(), stand_in.encode()))
        separator, quote = stand_in, False
    short: list[arrow_csv.InvalidRow] = []

    def skip(row: arrow_csv.InvalidRow) -> str:
        short.append(row)
        return "skip"

    parse = arrow_csv.ParseOptions(
        delimiter=separator,
        quote_char=quote,
        newlines_in_values=multiline,
        invalid_row_handler=None if skipping is None else skip,
    )
    convert = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted, strings_can_be_null=False
    )
    read = arrow_csv.ReadOptions(  # on one thread rows are numbered
        column_names=None if header else names, use_threads=skipping is None
    )
    try:
        table = arrow_csv.read_csv(pa.BufferReader(content), read, parse, convert)
    except pa.ArrowInvalid as error:
        _check_utf8(text)
        raise InputError(_parse_failure(text, content, read, parse, convert, error)) from error
    source = Source(path, table, whole, header)
    if skipping is None or not (short or len(lost)):
        return source
    rows = np.setdiff1d(np.arange(header, header + table.num_rows + len(short) + len(lost)), lost)  # before Arrow's
    bad = [row.number - 1 - header for row in short]
    lines = Source(path, table, whole)
    skipping.tell(
        len(short),
        (
            f"{lines.where(int(rows[place]))}: found {row.actual_columns} fields, expected {row.expected_columns}"
            for place, row in zip(bad, short, strict=True)
        ),
    )
    return Taken(path, table, whole, of=lines, rows=np.delete(rows, bad))


def _without_lines(text: Text, wrong: Callable[[bytes], str], skipping: BadRows) -> tuple[Text, np.ndarray]:
    """The text without the lines of which ``wrong`` says something, and which of the lines with text these were."""
    good, lost, lines, row = [], [], [], 0
    for number, line in enumerate(io.BytesIO(text.content), text.lines_before + 1):
        if not line.strip(b"\r\n"):
            continue
        if why := wrong(line):
            lost.append(row)
            lines.append(f"{text.path}, line {number}: {why}")
        else:
            good.append(line)
        row += 1
    if not lost:
        return text, NO_ROWS
    skipping.tell(len(lost), iter(lines))
    return replace(text, content=pa.py_buffer(b"".join(good))), np.array(lost)


def _not_utf8(line: bytes) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{line[error.start]:02x}"
    return ""


def _no_object(line: bytes) -> str:
    try:
        if isinstance(json.loads(line), dict):
            return ""
    except ValueError as error:
        return f"not a JSON object: {_one_line(error)}"
    return "not a JSON object"


def _header(text: Text, separator: str) -> list[str]:
    line = next((line for line in io.BytesIO(text.content) if line.strip(b"\r\n")), b"")
    try:
        names = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{text.path}, line 1: not UTF-8: byte 0x{line[error.start]:02x}") from error
    if len(separator.encode()) > 1:
        return names.split(separator)
    return next(csv.reader([names], delimiter=separator), [])


def _parse_failure(
    text: Text,
    content: pa.Buffer,
    read: arrow_csv.ReadOptions,
    parse: arrow_csv.ParseOptions,
    convert: arrow_csv.ConvertOptions,
    error: pa.ArrowInvalid,
) -> str:
    """One line for a text that does not parse; on one thread Arrow numbers the row."""
    read.use_threads = False
    try:
        arrow_csv.read_csv(pa.BufferReader(content), read, parse, convert)
    except pa.ArrowInvalid as numbered:
        error = numbered
    found = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", str(error))
    if not found:
        return f"{text.path}: cannot be read: {_one_line(error)}"
    line = replace(text, content=content).line(int(found[1]) - 1)
    return f"{text.path}, line {line}: found {found[3]} fields, expected {found[2]}"


def _parse_json_text(
    text: Text,
    wanted: list[str],
    types: tuple[pa.Schema | None, pa.Schema],
    whole: Text | None = None,
    lost: np.ndarray = NO_ROWS,
) -> Source:
    """Columns that nobody asked for may be of any and changing types: they are skipped where ``types`` tells the types
    of those asked for. ``text`` is ``whole`` without its rows ``lost``."""
    content, (schema, strings) = text.content, types
    try:
        try:
            table = _parse_json(content, schema or strings, "ignore" if schema else "infer")
        except pa.ArrowInvalid:
            if schema is None:
                raise
            table = _parse_json(content, strings, "infer")  # the head was not typical
    except pa.ArrowInvalid as error:
        _check_utf8(text)
        raise InputError(_json_failure(text, error)) from error
    check_columns(text.path, wanted, table.column_names)
    table = table.select(wanted)
    try:
        table.validate(full=True)  # Arrow's JSON reader does not look at the encoding
    except pa.ArrowInvalid:
        _check_utf8(text)
        raise
    source = Source(text.path, table, whole or text)
    if not len(lost):
        return source
    rows = np.setdiff1d(np.arange(table.num_rows + len(lost)), lost)
    return Taken(text.path, table, source.text, of=source, rows=rows)


def _parse_json(content: pa.Buffer, schema: pa.Schema, others: str) -> pa.Table:
    parse = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
    return arrow_json.read_json(pa.BufferReader(content), arrow_json.ReadOptions(block_size=JSON_BLOCK), parse)


def _json_types(text: Text, wanted: list[str]) -> tuple[pa.Schema | None, pa.Schema]:
    """The types of the wanted columns as the first lines tell them, None where they do not; and the columns that are
    strings in the first object, which Arrow would turn into timestamps where they look like dates."""
    first = _first_object(text)
    strings = pa.schema([(key, pa.string()) for key, value in first.items() if isinstance(value, str)])
    rows = []
    try:
        for line in itertools.islice((x for x in io.BytesIO(text.content) if x.strip()), JSON_HEAD):
            rows.append(json.loads(line))
        types = [pa.array([row.get(name) for row in rows]).type for name in wanted]
    except (ValueError, TypeError, AttributeError, pa.ArrowException):
        return None, strings
    empty_list = pa.list_(pa.null())
    types = [pa.list_(pa.string()) if kind == empty_list else kind for kind in types]
    return None if pa.null() in types else pa.schema(list(zip(wanted, types, strict=True))), strings


def _first_object(text: Text) -> dict:
    line = next((line for line in io.BytesIO(text.content) if line.strip()), b"")
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{text.path}, line 1: not a JSON object, expected one object a line")
    return value


def _json_failure(text: Text, error: pa.ArrowInvalid) -> str:
    for number, line in enumerate(io.BytesIO(text.content), text.lines_before + 1):
        try:
            if line.strip():
                json.loads(line)
        except ValueError as broken:
            return f"{text.path}, line {number}: not a JSON object: {_one_line(broken)}"
    return f"{text.path}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
