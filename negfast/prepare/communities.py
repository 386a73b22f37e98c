"""`prepare --split-within`: who belongs to which community, and at which moments each one's parts begin."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from negfast.data.log import DAY, Cuts, EventLog
from negfast.data.shards import Shard, histories
from negfast.errors import InputError
from negfast.prepare.reading import SortedLog

WITHIN = (0.76, 0.88)  # shares of a community's events before valid and before test
NONE = -1


@dataclass
class Communities:
    """The communities of a log, numbered in the order of ``names``, and what belongs to them."""

    column: str
    names: Sequence[str]
    log: SortedLog
    of_user: np.ndarray  # int32 [U], NONE where no event was seen
    of_item: np.ndarray  # int32 [I], NONE where neither the item table nor an event says it
    moments: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64), init=False)  # [C, 3], see `Cuts`

    @classmethod
    def of_events(cls, column: str, log: SortedLog, names: Sequence[str]) -> "Communities":
        """Where events tell their community, as an index into ``names``."""
        of_user, of_item = (np.full(len(ids), NONE, np.int32) for ids in (log.user_ids, log.item_ids))
        return cls(column, names, log, of_user, of_item)

    @classmethod
    def of_items(cls, column: str, log: SortedLog, names: Mapping[str, str]) -> "Communities":
        """Where the item table tells them, "" for none."""
        index = {name: number for number, name in enumerate(sorted(set(names.values()) - {""}))}
        communities = cls.of_events(column, log, list(index))
        communities.of_item[:] = [index.get(names.get(item, ""), NONE) for item in log.item_ids.to_pylist()]
        return communities

    def add(self, log: EventLog, first_user: int, of_event: np.ndarray | None) -> None:
        """Takes events of the users from ``first_user`` on, with what they tell of their community, int32 [N].
        InputError where an event has no community, or a user or item has two: nothing may cross."""
        if of_event is None:
            of_event = self.of_item[log.item]
            if (missing := np.flatnonzero(of_event == NONE)).size:
                item = self.log.item_ids[int(log.item[missing[0]])].as_py()
                raise InputError(f"--split-within {self.column!r}: item {item!r} has none")
        user = log.user + first_user
        for what, of, kept, ids in (
            ("user", user, self.of_user, self.log.user_ids),
            ("item", log.item, self.of_item, self.log.item_ids),
        ):
            new = kept[of] == NONE
            kept[of[new]] = of_event[new]
            if (crossing := np.flatnonzero(kept[of] != of_event)).size:
                row = crossing[0]
                raise InputError(
                    f"--split-within {self.column!r}: {what} {ids[int(of[row])].as_py()!r} has events in "
                    f"{self.names[of_event[row]]!r} and in {self.names[kept[of[row]]]!r}, expected one community for "
                    "each user and item"
                )

    def find_moments(self, shard: Shard) -> int:
        """Finds the moments of each community from the events that were kept; how many communities have some."""

        def batches() -> Iterator[pa.RecordBatch]:
            for users, log in histories(shard):
                yield pa.record_batch([self.of_user[users][log.user], log.time], schema)

        schema = pa.schema({"part": pa.int32(), "time": pa.int64()})
        found, moments = self.log.sorter.times_at(WITHIN, pa.RecordBatchReader.from_batches(schema, batches()))
        moments[:, 2] = (moments[:, 2] // DAY + 1) * DAY
        self.moments = np.zeros((len(self.names), 3), np.int64)
        self.moments[found] = moments
        return len(found)

    def cuts(self, valid_day: int) -> Cuts:
        return Cuts(valid_day, self.moments[self.of_user])
