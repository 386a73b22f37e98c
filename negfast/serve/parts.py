"""Long Parquet files made batch by batch: what was done before a kill is kept, and the file appears whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from negfast.data.dataset import MANIFEST, file_record
from negfast.files import atomic_file, check_output_file
from negfast.progress import Progress
from negfast.runtime.checkpoint import WEIGHTS
from negfast.runtime.engine import Engine
from negfast.runtime.run_folder import RunFolder

ABOUT = "about.json"


def write_in_parts(
    out: Path,
    schema: pa.Schema,
    about: dict[str, Any],
    total: int,
    size: int,
    make: Callable[[int, int], pa.Table],
    progress: tuple[str, str],
) -> None:
    """Writes ``make(start, stop)`` of every batch of ``size`` rows of ``total`` to ``out``, a row group each.

    A batch is kept in the folder ``.NAME.parts`` beside ``out`` until all are there. A call with the same ``about``
    (JSON types) goes on where an earlier one was killed; with another it starts anew. ``progress`` names work and unit.
    """
    check_output_file(out)
    folder = out.with_name(f".{out.name}.parts")
    if _about(folder) != about:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with atomic_file(folder / ABOUT) as temporary:
            temporary.write_text(json.dumps(about))
    starts = range(0, total, size)
    parts = {start: folder / f"{start:012d}.parquet" for start in starts}
    done = sum(min(size, total - start) for start in starts if parts[start].is_file())
    with Progress(progress[0], total, unit=progress[1], done=done) as bar:
        if done:
            bar.log(f"{out}: going on after {done:,} {progress[1]} of an earlier call")
        for start in starts:
            if parts[start].is_file():
                continue
            stop = min(start + size, total)
            table = make(start, stop)
            with atomic_file(parts[start]) as temporary:
                parquet.write_table(table.cast(schema), temporary, compression="zstd")
            done += stop - start
            bar.update(done)
    with atomic_file(out) as temporary, parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for part in parts.values():
            writer.write_table(parquet.read_table(part, schema=schema))
    shutil.rmtree(folder)


def source_of(run: Path, engine: Engine) -> dict[str, Any]:
    """What tells one answer of a run from another: checksums of its weights and of its data set."""
    weights = file_record(RunFolder(run).final / WEIGHTS)["sha256"]
    return {"weights": weights, "data": file_record(engine.data.path / MANIFEST)["sha256"]}


def _about(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        return None
