"""What a step of SFT or GRPO reads: histories of train days, and a draw of their requests.

A step visits whole histories. All that is asked of one, at any moment, shares one pass through it.
"""

from dataclasses import dataclass

import numpy as np

from negfast.data.log import events_before
from negfast.data.split import UserDays
from negfast.model.histories import Histories, window_start
from negfast.runtime.engine import Engine
from negfast.train.order import epoch_rows, task_rng
from negfast.train.step import MicroBatch


@dataclass(frozen=True)
class Drawn:
    """What a step asks of its histories: rows of the requests, by history and moment.

    The arrays are of the whole batch; a micro-batch has the histories of a slice.
    """

    histories: np.ndarray  # int64 [H]
    requests: np.ndarray  # int64 [R]
    owner: np.ndarray  # int64 [R], place of each one's history among the step's

    def part(self, micro_batch: MicroBatch) -> slice:
        """The requests of a micro-batch."""
        mine = micro_batch.of(len(self.histories))
        return slice(*np.searchsorted(self.owner, [mine.start, mine.stop]))


class HistoryTask:
    """The histories that have any of the requests."""

    def __init__(self, engine: Engine, name: str, requests: UserDays) -> None:
        """``name`` sets the order in which steps visit the histories."""
        self.engine, self.name, self.requests = engine, name, requests
        self.moment = requests.moment  # made once, for all steps
        history = self._history(requests.user, self.moment)
        keys = np.unique(history)
        self.size = len(keys)
        self.rows = np.lexsort((self.moment, history))  # by history and moment
        self.offsets = np.append(np.searchsorted(history[self.rows], keys), len(history))

    def _history(self, user: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """A key of the history that each (user, moment) branches off, int64."""
        log, window = self.engine.log, self.engine.config.history.window
        begin, first = log.user_offsets[user], np.zeros(len(user), np.int64)
        long = np.flatnonzero(log.user_offsets[user + 1] - begin > window)  # of other users there is one history
        first[long] = window_start(events_before(log, user[long], moment[long]) - begin[long], window)
        return user.astype(np.int64) * (len(log) + 1) + first

    def draw(self, step: int, histories: int, most: int) -> Drawn:
        """The ``histories`` of a step, with at most ``most`` requests of each, drawn at random."""
        seed = self.engine.config.train.seed
        visited = epoch_rows(seed, self.name, step, self.size, histories)
        counts = np.diff(self.offsets)[visited]
        owner = np.repeat(np.arange(len(visited)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        requests = self.rows[self.offsets[visited][owner] + within]
        lot = task_rng(seed, f"requests of {self.name}", step).random(len(requests))
        order = np.lexsort((lot, owner))
        place = np.arange(len(owner)) - np.searchsorted(owner, owner)
        chosen = np.sort(order[place < most])  # by history and moment again
        return Drawn(visited, requests[chosen], owner[chosen])

    def read(self, drawn: Drawn, micro_batch: MicroBatch, views: np.ndarray) -> Histories:
        """The micro-batch's histories, each through its view uint8 [H] of ``views``, with the prior of its requests."""
        mine = drawn.part(micro_batch)
        requests, view = drawn.requests[mine], views[drawn.owner[mine]]
        return self.engine.histories.build(self.requests.user[requests], self.moment[requests], view).with_prior()
