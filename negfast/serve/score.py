"""`negfast score`: calibrated dislike probability of candidate lists."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from negfast.data.log import EventLog
from negfast.errors import InputError
from negfast.files import locked
from negfast.prepare.readers import Source, encode, file_columns, read_table, to_strings
from negfast.serve.context import check_paths, quick_imports, report_context_moment
from negfast.serve.parts import write_table

ADDED = ("score", "abstain")
MEANING = {  # of a score, by what is given
    "feedback": "P(dislike | the user gives feedback), calibrated on the first likes and dislikes of valid",
    "shown": "P(dislike | shown), calibrated on what was first shown on the days of valid",
}


def score_run(
    run: Path, candidates: Path, data: Path | None, at: str | None, out: Path, given: str = "feedback"
) -> None:
    """Writes the table ``candidates`` (columns user and item) to ``out`` with two columns more.

    ``score`` in [0, 1] is calibrated to be P(dislike | the user likes or dislikes the item), or, ``given`` "shown",
    P(dislike | the item is shown). Where ``abstain`` is true the model knows nothing and the score is null: the user or
    the item is not in the data set, or before the moment the user has no event and the item no like or dislike
    (negfast's choice). Paths are checked first. Raises InputError for a missing file or column, for a table of which no
    user or no item is known, where the run cannot answer for ``given``, and as `RunFolder.finished_engine` does.
    """
    check_paths(run, data, out, [candidates])
    source = read_candidates(candidates)
    with locked(out):
        with quick_imports():
            from negfast.runtime.run_folder import RunFolder
            from negfast.runtime.verdict import candidate_logits, group_candidates

        folder = RunFolder(run)
        folder.require_finished()
        calibration = folder.calibration if given == "feedback" else folder.shown_calibration
        engine = folder.finished_engine(data, serving=True)
        user = index_of(source, "user", engine.data.user_ids)
        item = index_of(source, "item", engine.data.items.ids)
        moment = report_context_moment(folder, engine.log, at)
        answered = knows(engine.log, user, item, moment)
        rows = np.flatnonzero(answered)
        rows = rows[np.argsort(user[rows], kind="stable")]
        groups = group_candidates(user[rows], np.full(len(rows), moment), item[rows])
        probability = np.full(len(user), np.nan)
        if len(rows):
            probability[rows] = calibration.probability(candidate_logits(engine, groups))
        if not answered.all():
            print(f"abstained: {int((~answered).sum()):,} of {len(answered):,} pairs, nothing known", file=sys.stderr)
        score = pa.field("score", pa.float64(), metadata={"description": MEANING[given]})
        table = source.table.append_column(score, pa.array(probability, pa.float64(), mask=~answered))
        table = table.append_column("abstain", pa.array(~answered))
        write_table(out, table.schema, [table])


def knows(log: EventLog, user: np.ndarray, item: np.ndarray, moment: int) -> np.ndarray:
    """Whether anything is known of pairs of indices (-1: not in the data set) before a moment (seconds), bool [E]."""
    past = log.time < moment
    active, judged = np.zeros(log.n_users + 1, bool), np.zeros(log.n_items + 1, bool)
    active[log.user[past]] = True
    judged[log.item[past & log.judged]] = True
    return (user >= 0) & (item >= 0) & (active[user] | judged[item])


def read_candidates(path: Path) -> Source:
    """All columns of a table of any format that `negfast prepare` reads, user and item among them."""
    columns = file_columns(path)
    for name in ("user", "item"):
        if name not in columns:
            raise InputError(f"{path}: no column {name!r}, found {', '.join(columns)}")
    for name in ADDED:
        if name in columns:
            raise InputError(f"{path}: has a column {name!r} already")
    return read_table(path, columns)


def index_of(source: Source, column: str, known: list[str], needed: bool = True) -> np.ndarray:
    """The index of each row's id in ``known``, int64 [E], -1 where it is null or not there; ids are read as `prepare`
    reads them.

    InputError for what is no id, and where ``known`` has none of them and one is ``needed``.
    """
    ids = encode(source, column)
    index = compute.index_in(to_strings(ids), pa.array(known, pa.string())).fill_null(-1)
    found = np.append(index.to_numpy(zero_copy_only=False), -1)[ids.codes].astype(np.int64)
    if needed and len(found) and (found < 0).all():
        raise InputError(f"{source.path}: no {column} is known, the first is {source.table[column][0].as_py()!r}")
    return found
