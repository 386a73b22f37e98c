"""`negfast score`, `predict` and `user-profiles`: a `Run`, asked batch by batch, and the tables that it answers."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from negfast.data.dataset import file_record
from negfast.errors import InputError
from negfast.files import locked
from negfast.prepare.readers import BadRows, Source, check_columns, file_columns, read_blocks, read_table
from negfast.serve.context import check_paths, report_context_day, report_context_moment, source_of
from negfast.serve.ids import index_of
from negfast.serve.parts import Part, write_in_parts
from negfast.serve.predict import list_schema
from negfast.serve.run import Given, Rank, Run
from negfast.serve.score import MEANING

USERS_AT_ONCE = 4096
ROWS_AT_ONCE = 1 << 22  # of lists; fewer users at once where each has many
PAIRS_AT_ONCE = 1 << 16
ADDED = ("score", "abstain")


def predict_run(
    run: Path,
    data: Path | None,
    at: str | None,
    top: int,
    out: Path,
    users: Path | None = None,
    items: Path | None = None,
    not_items: Path | None = None,
    rank: Rank = "likely",
    part: str | None = None,
) -> None:
    """Writes `Run.predict` to ``out``; ``users``, ``items`` and ``not_items`` are files whose columns ``user`` and
    ``item`` have the ids. ``part`` "2/8" is the second eighth (`Part`). The same call resumes a killed one.

    Raises InputError for files that cannot be read or name nothing that is known, and as `Run.predict`.
    """
    asked = {name: path for name, path in (("users", users), ("items", items), ("not_items", not_items)) if path}
    share = Part.parse(part)
    check_paths(run, data, out, asked.values())
    lists = {name: read_ids(path, "user" if name == "users" else "item") for name, path in asked.items()}
    with locked(out):
        asks = open_run(run, data)
        engine = asks._engine
        for name, source in lists.items():
            _report_unknown(asks, source, name != "not_items")
        ids = {name: source.table.column(0) for name, source in lists.items()}
        chosen = {name: ids.get(name) for name in ("items", "not_items")}
        of_users = asks._user_ids.take(pa.array(asks._known("user", ids.get("users"))))
        top = min(top, int(asks._listed(**chosen).sum()))
        day = report_context_day(asks._folder, engine.log, at)

        def batch(start: int, stop: int) -> pa.Table:
            return asks.predict(of_users.slice(start, stop - start), top, at, **chosen, rank=rank)

        at_once = max(1, min(USERS_AT_ONCE, ROWS_AT_ONCE // top))
        about: dict[str, Any] = {"what": "predict", **source_of(asks._folder, engine), "day": day, "top": top}
        about |= {"users_at_once": at_once, "rank": rank}
        about |= {name: file_record(path)["sha256"] for name, path in asked.items()}
        write_in_parts(out, list_schema(rank), about, len(of_users), at_once, batch, ("predict", "users"), share)


def profile_users(
    run: Path, attribute: str | None, data: Path | None, at: str | None, out: Path, part: str | None = None
) -> None:
    """Writes `Run.profile` of all users to ``out``. ``part`` "2/8" is the second eighth (`Part`). Raises InputError as
    `Run.profile`."""
    share = Part.parse(part)
    check_paths(run, data, out)
    with locked(out):
        asks = open_run(run, data)
        from negfast.serve.profiles import SCHEMA

        engine = asks._engine
        asks.profile([], attribute=attribute, at=at)  # refuses before anything is said or written
        day = report_context_day(asks._folder, engine.log, at)
        about = {
            "what": "profiles",
            **source_of(asks._folder, engine),
            "day": day,
            "attribute": attribute,
            "users": USERS_AT_ONCE,
        }

        def batch(start: int, stop: int) -> pa.Table:
            return asks.profile(asks._user_ids.slice(start, stop - start), attribute=attribute, at=at)

        write_in_parts(out, SCHEMA, about, engine.log.n_users, USERS_AT_ONCE, batch, ("profiles", "users"), share)


def score_run(
    run: Path,
    candidates: Path,
    data: Path | None,
    at: str | None,
    out: Path,
    given: Given = "feedback",
    part: str | None = None,
) -> None:
    """Writes the table ``candidates`` (columns user and item) to ``out`` with the columns of `Run.score` added, the
    score null where it abstains. ``part`` "2/8" is the second eighth (`Part`). The same call resumes a killed one.

    The file is read twice, block by block: every row is checked before the first is scored. Raises InputError for a
    missing file or column, a row that cannot be read, a table of which no user or no item is known, and as `Run.score`.
    """
    share = Part.parse(part)
    check_paths(run, data, out, [candidates])
    columns = candidate_columns(candidates)
    with locked(out):
        asks = open_run(run, data)
        asks._calibration(given)
        engine = asks._engine
        moment = report_context_moment(asks._folder, engine.log, at)
        schema, total = _check_candidates(asks, candidates, columns, moment)
        score = pa.field("score", pa.float64(), metadata={"description": MEANING[given]})
        rows = _Rows(read_blocks(candidates, columns, bad=BadRows()), schema)

        def batch(start: int, stop: int) -> pa.Table:
            table = rows.take(start, stop)
            scores = asks.score(table["user"], table["item"], at, given)
            table = table.append_column(score, pa.array(scores.probability, pa.float64(), mask=scores.abstain))
            return table.append_column("abstain", pa.array(scores.abstain))

        about = {"what": "score", **source_of(asks._folder, engine), "moment": moment, "given": given}
        about |= {"candidates": file_record(candidates)["sha256"], "pairs": PAIRS_AT_ONCE}
        whole = schema.append(score).append(pa.field("abstain", pa.bool_()))
        write_in_parts(out, whole, about, total, PAIRS_AT_ONCE, batch, ("score", "pairs"), share)


def open_run(run: Path, data: Path | None) -> Run:
    """A run with as many CPU threads as its settings say."""
    asks = Run(run, data)
    folder = asks._folder
    from negfast.runtime.machine import use_threads

    folder.require_finished()
    use_threads(folder.config.train.threads)
    return asks


def read_ids(path: Path, column: str) -> Source:
    """The column of ids of a table in any format that `negfast prepare` reads."""
    check_columns(path, [column], file_columns(path))
    return read_table(path, [column])


def _report_unknown(run: Run, source: Source, needed: bool) -> None:
    """Counts on stderr the ids of a column that the data set does not have. InputError where it has none of them, and
    one is ``needed``."""
    [column] = source.table.column_names
    index = index_of(source, column, run._index[column])
    strange = int((index < 0).sum())
    if needed and len(index) and strange == len(index):
        raise none_known(source, column)
    if strange:
        print(f"{source.path}: {strange:,} of {len(index):,} {column}s are not in the data set", file=sys.stderr)


def none_known(source: Source, column: str) -> InputError:
    return InputError(f"{source.path}: no {column} is known, the first is {source.table[column][0].as_py()!r}")


def candidate_columns(path: Path) -> list[str]:
    """All columns of a table of candidates, user and item among them."""
    columns = file_columns(path)
    for name in ("user", "item"):
        if name not in columns:
            raise InputError(f"{path}: no column {name!r}, found {', '.join(columns)}")
    for name in ADDED:
        if name in columns:
            raise InputError(f"{path}: has a column {name!r} already")
    return columns


def _check_candidates(run: Run, path: Path, columns: list[str], moment: int) -> tuple[pa.Schema, int]:
    """Reads all candidates: the schema that holds them all, and their number. Says on stderr of how many nothing is
    known. Raises InputError for a row that cannot be read, and where no user or no item is known."""
    schemas: list[pa.Schema] = []
    first: Source | None = None
    total = abstained = 0
    unknown = {"user": True, "item": True}
    for source, _ in read_blocks(path, columns, bad=BadRows()):
        first = first or source
        if source.table.schema not in schemas:
            schemas.append(source.table.schema)
        index = {column: index_of(source, column, run._index[column]) for column in unknown}
        for column in unknown:
            unknown[column] &= bool((index[column] < 0).all())
        known = run._first_known.before(index["user"], index["item"], moment)
        total, abstained = total + len(known), abstained + int((~known).sum())
    assert first is not None
    for column, is_unknown in unknown.items():
        if total and is_unknown:
            raise none_known(first, column)
    if abstained:
        print(f"abstained: {abstained:,} of {total:,} pairs, nothing known", file=sys.stderr)
    try:
        return pa.unify_schemas(schemas, promote_options="permissive"), total
    except pa.ArrowException as error:
        raise InputError(f"{path}: a column changes its type: {' '.join(str(error).split())}") from error


class _Rows:
    """Rows of a file that is read block by block, taken in ascending order."""

    def __init__(self, blocks: Iterator[tuple[Source, int]], schema: pa.Schema) -> None:
        self.blocks, self.schema = blocks, schema
        self.held, self.first = schema.empty_table(), 0  # rows that were read, from row ``first`` of the file on

    def take(self, start: int, stop: int) -> pa.Table:
        """The rows from ``start``, at or after the last ``stop``, to ``stop``."""
        while self.first + len(self.held) < stop:
            self._drop(start)
            table = next(self.blocks)[0].table.cast(self.schema)
            self.held = pa.concat_tables([self.held, table])
        self._drop(start)
        return self.held.slice(0, stop - start)

    def _drop(self, start: int) -> None:
        gone = min(max(start - self.first, 0), len(self.held))
        self.held, self.first = self.held.slice(gone), self.first + gone
