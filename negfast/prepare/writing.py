"""The events of a sorted log to disk, some users at a time, and what there is to say of them all."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np

from negfast.data.dataset import EVENTS, VALUES
from negfast.data.log import Cuts, EventLog
from negfast.data.shards import Shard, ShardBuilder, histories
from negfast.data.split import F_AHEAD, DayCounts, refuse_empty_parts, request_days, user_part_masks
from negfast.prepare.communities import Communities
from negfast.prepare.reading import LONG, SortedLog
from negfast.progress import Progress

SORTED_BYTES = 1 << 26  # of the shard's own sort, which finds little to do
ROW_BYTES = 32  # a log of fewer than LONG / ROW_BYTES events needs no progress bar

TakeBack = Callable[[EventLog, np.ndarray], tuple[EventLog, int, int]]


@dataclass
class LogSummary:
    """What is said of a log, gathered from its users, some at a time."""

    days: DayCounts
    n_items: int
    n_users: int = 0
    n_events: int = 0
    repeats: int = 0  # events that are the same as an earlier one
    taken_back: int = 0  # likes and dislikes
    taken_back_same_day: int = 0
    feedback: np.ndarray = field(default_factory=lambda: np.zeros(4, np.int64))  # events of each

    @classmethod
    def of(cls, log: EventLog, horizon: int) -> "LogSummary":
        """Of a log in memory."""
        summary = cls(DayCounts.empty(int(log.day.min()), int(log.day.max()), horizon), log.n_items)
        summary.add(log)
        return summary

    def add(self, log: EventLog) -> None:
        """Users of whom this is all that they did."""
        self.days.add(log)
        self.n_users += log.n_users
        self.n_events += len(log)
        self.repeats += int(log.repeats().sum())
        self.feedback += np.bincount(log.feedback, minlength=4)

    def feedback_counts(self) -> dict[str, int]:
        """Events by feedback, as manifests and summaries name them; withdrawals only where there are any."""
        exposed, likes, dislikes, withdrawn = self.feedback.tolist()
        counts = {"dislikes": dislikes, "likes": likes, "exposed": exposed}
        return counts | {"withdrawn": withdrawn} if withdrawn else counts

    def counts(self) -> dict[str, int]:
        return {"users": self.n_users, "items": self.n_items, "events": self.n_events, **self.feedback_counts()}


def write_log(
    directory: Path,
    log: SortedLog,
    horizon: int,
    *,
    drop_repeats: bool = False,
    take_back: TakeBack | None = None,
    communities: Communities | None = None,
) -> LogSummary:
    """Writes EVENTS and, where the log has values, VALUES, in memory that does not depend on the log's length.

    ``take_back`` gives events that take others back their meaning, before repeats are dropped, and tells how many did,
    and how many on the day itself. ``communities`` learn who belongs where.
    """
    n_users, n_items = len(log.user_ids), len(log.item_ids)
    summary = LogSummary(DayCounts.empty(log.first_day, log.last_day, horizon), n_items)
    builder = ShardBuilder(directory / EVENTS, n_users, n_items, memory_bytes=SORTED_BYTES)
    total, done = len(log.sorter), 0
    short = total * ROW_BYTES < LONG
    with TemporaryFile(dir=directory) as values, Progress("sorting", total, "events", quiet=short) as bar:
        for chunk, others in log.chunks():
            done += len(chunk)
            first = summary.n_users
            if communities is not None:
                communities.add(chunk, first, others.get("community"))
            if take_back is not None:
                chunk, taken, same_day = take_back(chunk, others["takes_back"])
                summary.taken_back += taken
                summary.taken_back_same_day += same_day
            if drop_repeats:
                repeats = chunk.repeats()
                summary.repeats += int(repeats.sum())
                chunk = chunk.without(repeats)
            summary.add(chunk)
            builder.add(chunk.user + np.int32(first), chunk.item, chunk.feedback, chunk.time)
            if chunk.value is not None:
                values.write(np.ascontiguousarray(chunk.value, "<f4").data)
            bar.update(done)
        builder.finish(len(os.sched_getaffinity(0)))
        if values.tell():
            with (directory / VALUES).open("wb") as file:
                _copy_values(values, file, summary.n_events)
    return summary


def taken_back(count: int, same_day: int) -> str:
    """What to say of judgements that were taken back."""
    return f"feedback: {count:,} likes and dislikes were taken back, {same_day:,} of them on their own day"


def _copy_values(values: BinaryIO, file: BinaryIO, count: int) -> None:
    """float32 values as a safetensors file of one tensor, "value", the bytes that `safetensors.numpy.save_file` would
    write of an array in memory."""
    header = f'{{"value":{{"dtype":"F32","shape":[{count}],"data_offsets":[0,{4 * count}]}}}}'.encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    values.seek(0)
    shutil.copyfileobj(values, file, 1 << 20)


def count_parts(
    shard: Shard, horizon: int, valid_day: int, test_day: int, days: tuple[int, int], cuts: Cuts | None = None
) -> dict[str, tuple[int, int]]:
    """Requests of train, valid and test in a shard of the log from the first to the last of ``days``, and how many of
    them have dislikes, in bounded memory. Raises InputError as `split_requests` does."""
    parts = dict.fromkeys(("train", "valid", "test"), (0, 0))
    for _, log in histories(shard, cuts):
        user, day, ahead = request_days(log, horizon)
        for name, mask in user_part_masks(log, user, day, horizon, valid_day, test_day, days[1]).items():
            requests, with_dislikes = parts[name]
            parts[name] = requests + int(mask.sum()), with_dislikes + int((mask & (ahead & F_AHEAD > 0)).sum())
    refuse_empty_parts(parts, horizon, *days, valid_day, test_day)
    return parts
