"""Long tables made batch by batch: what was done before a kill is kept, and the file appears whole."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet

from negfast.errors import InputError
from negfast.files import atomic_file
from negfast.progress import Progress

ABOUT = "about.json"
ASKED = b"negfast"  # key of the schema metadata that holds what a table answers, as JSON


@dataclass(frozen=True)
class Part:
    """The ``number``-th of ``of`` runs of batches, from 1: what one machine of several does."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str | None) -> "Part":
        """From "2/8"; the whole by default. InputError for what is no such part."""
        if text is None:
            return cls()
        number, _, of = text.partition("/")
        if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
            return cls(int(number), int(of))
        raise InputError(f"--part: found {text!r}, expected I/N with I from 1 to N, such as 2/8")

    def take(self, batches: range) -> range:
        """Its share: those of the parts, one after the other, are all."""
        return batches[len(batches) * (self.number - 1) // self.of : len(batches) * self.number // self.of]


def write_in_parts(
    out: Path,
    schema: pa.Schema,
    about: dict[str, Any],
    total: int,
    size: int,
    make: Callable[[int, int], pa.Table],
    progress: tuple[str, str],
    part: Part,
) -> None:
    """Writes ``make(start, stop)`` of every batch of ``size`` rows of ``total`` to ``out``, a row group each.

    A batch is kept in the folder ``.NAME.parts`` beside ``out`` until all are there. Every part carries ``about`` (JSON
    types), what it was asked: a call with the same ``about`` resumes where an earlier one was killed, and parts with
    another are not used. ``progress`` names work and unit. The caller holds the lock on ``out``.

    With ``part`` only its batches are made and written. Row groups and metadata are those of the whole, so the files of
    all parts, row group after row group, are the whole file.
    """
    folder = out.with_name(f".{out.name}.parts")
    schema = schema.with_metadata({ASKED: json.dumps(about)})
    if _about(folder) != about:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with atomic_file(folder / ABOUT) as temporary:
            temporary.write_text(json.dumps(about))
    starts = part.take(range(0, total, size))
    parts = {start: folder / f"{start:012d}.parquet" for start in starts}
    made = {start for start in starts if _answers(parts[start], schema)}
    done = sum(min(size, total - start) for start in made)
    rows = sum(min(size, total - start) for start in starts)
    with Progress(progress[0], rows, unit=progress[1], done=done) as bar:
        if done:
            bar.log(f"{out}: resuming after {done:,} {progress[1]} of an earlier call")
        for start in starts:
            if start in made:
                continue
            stop = min(start + size, total)
            table = make(start, stop)
            with atomic_file(parts[start]) as temporary:
                parquet.write_table(table.cast(schema), temporary, compression="zstd")
            done += stop - start
            bar.update(done)
    write_table(out, schema, (parquet.read_table(part) for part in parts.values()))
    shutil.rmtree(folder)


def write_table(out: Path, schema: pa.Schema, tables: Any) -> None:
    """Writes an iterable of tables to ``out`` as its suffix says, Parquet or CSV (`negfast.files.check_table`)."""
    with atomic_file(out) as temporary:
        writer = (
            csv.CSVWriter(temporary, schema)
            if out.suffix == ".csv"
            else parquet.ParquetWriter(temporary, schema, compression="zstd")
        )
        with writer:
            for table in tables:
                writer.write_table(table)


def _answers(part: Path, schema: pa.Schema) -> bool:
    """Whether a part is there and was asked what ``schema`` says."""
    try:
        return parquet.read_schema(part).equals(schema, check_metadata=True)
    except (OSError, pa.ArrowException):
        return False


def _about(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        return None
