"""`negfast score`: calibrated dislike probability of candidate lists."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from negfast.data.dataset import date_of
from negfast.errors import InputError
from negfast.evaluate.model import candidate_logits
from negfast.files import atomic_file, check_output
from negfast.run_folder import RunFolder
from negfast.serve.context import context_day
from negfast.train.verdict import group_candidates


def score_run(run: Path, candidates: Path, data: Path | None, at: str | None, out: Path) -> None:
    """Writes the table ``candidates`` (columns user and item) to ``out`` with a column ``score`` in [0, 1].

    Raises InputError for a missing file or column, an unknown user or item, and as `RunFolder.finished_engine` does.
    """
    check_output(out)
    table = _read(candidates)
    engine = RunFolder(run).finished_engine(data)
    user = _index(table, "user", engine.data.user_ids, candidates)
    item = _index(table, "item", engine.data.items.ids, candidates)
    day = context_day(engine.log, at)
    print(f"context: events up to the end of {date_of(day)}", file=sys.stderr)
    order = np.argsort(user, kind="stable")
    groups = group_candidates(user[order], np.full(len(order), day + 1), item[order])
    logits = np.empty(len(order))
    logits[order] = candidate_logits(engine, groups)
    probability = RunFolder(run).calibration.probability(logits)
    with atomic_file(out) as temporary:
        parquet.write_table(table.append_column("score", pa.array(probability, pa.float64())), temporary)


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        table = parquet.read_table(path)
    except pa.ArrowException as error:
        raise InputError(f"{path}: not Parquet: {' '.join(str(error).split())}") from error
    for name in ("user", "item"):
        if name not in table.column_names:
            raise InputError(f"{path}: no column {name!r}, found {', '.join(table.column_names)}")
    if "score" in table.column_names:
        raise InputError(f"{path}: has a column 'score' already")
    return table


def _index(table: pa.Table, column: str, known: list[str], path: Path) -> np.ndarray:
    """The index of each value of a column in ``known``, int64 [E]."""
    values = table[column].cast(pa.string())
    found = compute.index_in(values, pa.array(known, pa.string()))
    if found.null_count:
        row = compute.index(compute.is_null(found), True).as_py()
        raise InputError(f"{path}: row {row + 1}: unknown {column} {values[row].as_py()!r}")
    return found.to_numpy().astype(np.int64)
