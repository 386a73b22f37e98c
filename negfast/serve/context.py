"""The moment that serving looks from."""

from datetime import UTC, datetime

from negfast.data.dataset import date_of, day_of
from negfast.data.log import EventLog
from negfast.errors import InputError


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
    except ValueError as error:
        raise InputError(f"--at: found {at!r}, expected an ISO time such as 2013-08-01") from error
    if day < first:
        raise InputError(f"--at: found {at}, expected a time after the log's first day {date_of(first)}")
    return min(day, last)
