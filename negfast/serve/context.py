"""The moment that serving looks from."""

import sys
from datetime import UTC, datetime

from negfast.data.dataset import date_of, day_of
from negfast.data.log import EventLog
from negfast.errors import InputError
from negfast.runtime.run_folder import RunFolder


def told_context_day(run: RunFolder, log: EventLog, at: str | None) -> int:
    """`context_day`, told on stderr; also that the run learned from later events, where it did."""
    day = context_day(log, at)
    print(f"context: events up to the end of {date_of(day)}", file=sys.stderr)
    if day + 1 < run.learned_until:
        until = date_of(run.learned_until)
        print(f"note: {run.path} learned from events before {until}, so its answers know of them", file=sys.stderr)
    return day


def context_day(log: EventLog, at: str | None) -> int:
    """The last day (since 1970) whose events count: the last whole day before ``at``, an ISO time, UTC where it names
    no zone; the log's last by default. Raises InputError for what is not a time, or lies before the log's second day.
    """
    first, last = int(log.day.min()), int(log.day.max())
    if at is None:
        return last
    try:
        when = datetime.fromisoformat(at)
        when = when if when.tzinfo is None else when.astimezone(UTC)
        day = day_of(when.date().isoformat()) - 1
    except (ValueError, OverflowError) as error:
        raise InputError(f"--at: found {at!r}, expected an ISO time such as 2013-08-01") from error
    if day < first:
        raise InputError(f"--at: found {at}, expected a time after the log's first day {date_of(first)}")
    return min(day, last)
