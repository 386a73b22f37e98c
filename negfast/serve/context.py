"""What every serving command starts with: paths that hold, the run, and the moment it looks from."""

import gc
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from negfast.data.dataset import MANIFEST, date_of, day_of, file_record, refuse_data_folder
from negfast.data.log import DAY, EventLog
from negfast.errors import InputError
from negfast.files import check_input_file, check_table

if TYPE_CHECKING:
    from negfast.runtime.engine import Engine
    from negfast.runtime.run_folder import RunFolder


def check_paths(run: Path, data: Path | None, out: Path, inputs: Collection[Path] = ()) -> None:
    """Raises InputError for paths that cannot do, known before torch is imported.

    ``run`` is a run, ``data`` a directory; ``out`` is a table that lies in no data set and is none of ``inputs``.
    """
    check_table(out)
    refuse_data_folder(out)
    for path in inputs:
        check_input_file(path)
        if out.exists() and out.samefile(path):
            raise InputError(f"{out}: is an input of this command; choose another --out")
    if not (run / "run.json").is_file():
        raise InputError(f"{run}: found no run.json, expected a run directory")
    if data is not None and not data.is_dir():
        raise InputError(f"{data}: no such data set directory")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Without the collector within the block: imports make a million objects, and it would look at them all again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def report_context_day(run: "RunFolder", log: EventLog, at: str | None) -> int:
    """`context_day`, printed to stderr; a note where the run learned from later events."""
    day = context_day(log, at)
    print(f"context: events up to the end of {date_of(day)}", file=sys.stderr)
    _note_later(run, (day + 1) * DAY)
    return day


def report_context_moment(run: "RunFolder", log: EventLog, at: str | None) -> int:
    """The moment (seconds) before which a verdict's events lie, printed to stderr: in a run of context "event" the
    second ``at``, else as `report_context_day`. Raises InputError as `context_day`."""
    if run.config.history.context == "day" or at is None:
        return (report_context_day(run, log, at) + 1) * DAY
    moment = min(int(_time_of(at).timestamp()), (int(log.day.max()) + 1) * DAY)
    if moment <= log.time.min():
        raise InputError(f"--at: found {at}, expected a time after the log's first event")
    print(f"context: events before {datetime.fromtimestamp(moment, UTC):%Y-%m-%dT%H:%M:%S}", file=sys.stderr)
    _note_later(run, moment)
    return moment


def context_day(log: EventLog, at: str | None) -> int:
    """The last day (since 1970) whose events count: the last whole day before ``at``, an ISO time, UTC where it names
    no zone; the log's last by default. Raises InputError for what is not a time, or lies before the log's second day.
    """
    first, last = int(log.day.min()), int(log.day.max())
    if at is None:
        return last
    day = day_of(_time_of(at).date().isoformat()) - 1
    if day < first:
        raise InputError(f"--at: found {at}, expected a time after the log's first day {date_of(first)}")
    return min(day, last)


def _time_of(at: str) -> datetime:
    """In UTC. InputError for what is not a time."""
    try:
        when = datetime.fromisoformat(at)
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
