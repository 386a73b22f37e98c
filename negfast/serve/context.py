"""The moment that is looked from, and what the commands that write tables start with: paths that hold."""

import gc
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from negfast.data.dataset import MANIFEST, date_of, file_record, refuse_data_folder
from negfast.data.log import DAY, EventLog
from negfast.errors import InputError
from negfast.files import check_input_file, check_table

if TYPE_CHECKING:
    from negfast.runtime.engine import Engine
    from negfast.runtime.run_folder import RunFolder

Moment = str | date | datetime | np.datetime64  # ISO, UTC where it names no zone; numpy's are in UTC


def check_paths(run: Path, data: Path | None, out: Path, inputs: Collection[Path] = ()) -> None:
    """Raises InputError for paths that cannot do, known before torch is imported.

    ``run`` and ``data`` as for `check_run`; ``out`` is a table that lies in no data set and is none of ``inputs``.
    """
    check_table(out)
    refuse_data_folder(out)
    for path in inputs:
        check_input_file(path)
        if out.exists() and out.samefile(path):
            raise InputError(f"{out}: is an input of this command; choose another --out")
    check_run(run, data)


def check_run(run: Path, data: Path | None) -> None:
    """Raises InputError unless ``run`` is a run and ``data``, where given, a directory."""
    if not (run / "run.json").is_file():
        raise InputError(f"{run}: found no run.json, expected a run directory")
    if data is not None and not data.is_dir():
        raise InputError(f"{data}: no such data set directory")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Without the collector within the block: imports make a million objects, and it would look at them all again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def report_context_day(run: "RunFolder", log: EventLog, at: Moment | None) -> int:
    """`context_day`, printed to stderr; a note where the run learned from later events."""
    day = context_day(log, at)
    print(f"context: events up to the end of {date_of(day)}", file=sys.stderr)
    _note_later(run, (day + 1) * DAY)
    return day


def report_context_moment(run: "RunFolder", log: EventLog, at: Moment | None) -> int:
    """`context_moment`, printed to stderr; a note where the run learned from later events."""
    context = run.config.history.context
    if context == "day" or at is None:
        return (report_context_day(run, log, at) + 1) * DAY
    moment = context_moment(context, log, at)
    print(f"context: events before {datetime.fromtimestamp(moment, UTC):%Y-%m-%dT%H:%M:%S}", file=sys.stderr)
    _note_later(run, moment)
    return moment


def context_moment(context: str, log: EventLog, at: Moment | None) -> int:
    """The moment (seconds) before which a verdict's events lie: in context "event" the second ``at``, else the end of
    `context_day`. Raises InputError as `context_day`."""
    if context == "day" or at is None:
        return (context_day(log, at) + 1) * DAY
    moment = min(int(time_of(at).timestamp()), (int(log.day.max()) + 1) * DAY)
    if moment <= log.time.min():
        raise InputError(f"--at: found {at}, expected a time after the log's first event")
    return moment


def context_day(log: EventLog, at: Moment | None) -> int:
    """The last day (since 1970) whose events count: the last whole day before ``at``; the log's last by default.
    Raises InputError for what is no time, or lies before the log's second day."""
    first, last = int(log.time.min()) // DAY, int(log.time.max()) // DAY
    if at is None:
        return last
    day = int(time_of(at).timestamp()) // DAY - 1
    if day < first:
        raise InputError(f"--at: found {at}, expected a time after the log's first day {date_of(first)}")
    return min(day, last)


def time_of(at: Moment) -> datetime:
    """In UTC. InputError for what is not a time."""
    try:
        text = str(at.astype("datetime64[us]")) if isinstance(at, np.datetime64) else str(at)
        when = datetime.fromisoformat(text)  # of NaT neither pandas nor numpy writes an ISO time
        return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InputError(f"--at: found {at!r}, expected an ISO date or time such as 2013-08-01") from error


def _note_later(run: "RunFolder", moment: int) -> None:
    if moment < run.learned_until * DAY:
        until = date_of(run.learned_until)
        print(f"note: {run.path} learned from events before {until}, so its scores know of them", file=sys.stderr)


def source_of(run: "RunFolder", engine: "Engine") -> dict[str, Any]:
    """What tells one answer of a run from another: checksums of its weights and of its data set."""
    from negfast.runtime.checkpoint import WEIGHTS, read_state

    weights = read_state(run.final)["files"][WEIGHTS]["sha256"]  # verified as they were loaded
    return {"weights": weights, "data": file_record(engine.data.path / MANIFEST)["sha256"]}
