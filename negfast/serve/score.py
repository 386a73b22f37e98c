"""`negfast score`: calibrated dislike probability of candidate lists."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from negfast.data.log import EventLog
from negfast.errors import InputError
from negfast.files import atomic_file, check_output_file
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.verdict import candidate_logits, group_candidates
from negfast.serve.context import told_context_day

ADDED = ("score", "abstain")


def score_run(run: Path, candidates: Path, data: Path | None, at: str | None, out: Path) -> None:
    """Writes the table ``candidates`` (columns user and item) to ``out`` with two columns more.

    ``score`` in [0, 1] is the calibrated probability that the user dislikes the item. Where ``abstain`` is true the
    model knows nothing and the score is null: the user or the item is not in the data set, or up to the day neither has
    the user any event nor the item any like or dislike (negfast's choice). Raises InputError for a missing file or
    column, for a table of which no user or no item is known, and as `RunFolder.finished_engine` does.
    """
    check_output_file(out)
    table = _read(candidates)
    folder = RunFolder(run)
    engine = folder.finished_engine(data)
    user = _index(table, "user", engine.data.user_ids, candidates)
    item = _index(table, "item", engine.data.items.ids, candidates)
    day = told_context_day(folder, engine.log, at)
    answered = knows(engine.log, user, item, day)
    rows = np.flatnonzero(answered)
    rows = rows[np.argsort(user[rows], kind="stable")]
    groups = group_candidates(user[rows], np.full(len(rows), day + 1), item[rows])
    probability = np.full(len(user), np.nan)
    if len(rows):
        probability[rows] = folder.calibration.probability(candidate_logits(engine, groups))
    if not answered.all():
        print(f"abstained: {int((~answered).sum()):,} of {len(answered):,} pairs, nothing known", file=sys.stderr)
    table = table.append_column("score", pa.array(probability, pa.float64(), mask=~answered))
    with atomic_file(out) as temporary:
        parquet.write_table(table.append_column("abstain", pa.array(~answered)), temporary)


def knows(log: EventLog, user: np.ndarray, item: np.ndarray, day: int) -> np.ndarray:
    """Whether anything is known of pairs of indices (-1: not in the data set) at the end of a day, bool [E]."""
    past = log.day <= day
    active, judged = np.zeros(log.n_users + 1, bool), np.zeros(log.n_items + 1, bool)
    active[log.user[past]] = True
    judged[log.item[past & log.judged]] = True
    return (user >= 0) & (item >= 0) & (active[user] | judged[item])


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
    for name in ADDED:
        if name in table.column_names:
            raise InputError(f"{path}: has a column {name!r} already")
    return table


def _index(table: pa.Table, column: str, known: list[str], path: Path) -> np.ndarray:
    """The index of each value of a column in ``known``, int64 [E], -1 where it is not there."""
    try:
        values = table[column].cast(pa.string())
    except pa.ArrowException as error:
        raise InputError(
            f"{path}: column {column!r}: found {table[column].type}, expected strings or integers"
        ) from error
    found = compute.index_in(values, pa.array(known, pa.string())).fill_null(-1).to_numpy().astype(np.int64)
    if len(found) and (found < 0).all():
        raise InputError(f"{path}: no {column} is known, the first is {values[0].as_py()!r}")
    return found
