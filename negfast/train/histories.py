"""What a step of SFT or GRPO reads: histories of train days, their verdicts, and a draw of their requests.

A step visits whole histories. All that is asked of one, at any moment, shares one pass through it.
"""

from dataclasses import dataclass

import numpy as np

from negfast.data.log import events_before
from negfast.data.split import UserDays
from negfast.model.histories import Histories, window_start
from negfast.runtime.engine import Engine
from negfast.runtime.verdict import Candidates
from negfast.train.order import epoch_rows, task_rng
from negfast.train.step import MicroBatch


@dataclass(frozen=True)
class Drawn:
    """What a step asks of its histories: rows of the requests and of the verdicts' groups, by history and moment.

    The arrays are of the whole batch; a micro-batch has the histories of a slice.
    """

    histories: np.ndarray  # int64 [H]
    requests: np.ndarray  # int64 [R]
    request_history: np.ndarray  # int64 [R], place of each among the step's histories
    groups: np.ndarray  # int64 [G]
    group_history: np.ndarray  # int64 [G]

    def part(self, micro_batch: MicroBatch) -> tuple[slice, slice, slice]:
        """The histories, requests and groups of a micro-batch."""
        mine = micro_batch.of(len(self.histories))
        requests, groups = (
            slice(*np.searchsorted(owner, [mine.start, mine.stop]))
            for owner in (self.request_history, self.group_history)
        )
        return mine, requests, groups


class HistoryTask:
    """The histories that have any of the requests or candidates."""

    def __init__(self, engine: Engine, name: str, requests: UserDays, candidates: Candidates) -> None:
        """``name`` sets the order in which steps visit the histories."""
        self.engine, self.name, self.requests, self.candidates = engine, name, requests, candidates
        self.request_moment = requests.moment  # made once, for all steps
        of_request = self._history(requests.user, self.request_moment)
        of_group = self._history(candidates.user, candidates.moment)
        keys = np.unique(np.concatenate([of_request, of_group]))
        self.size = len(keys)
        self.request_rows, self.request_offsets = _by_history(keys, of_request, self.request_moment)
        self.group_rows, self.group_offsets = _by_history(keys, of_group, candidates.moment)

    def _history(self, user: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """A key of the history that each (user, moment) branches off, int64."""
        log, window = self.engine.log, self.engine.config.history.window
        begin, first = log.user_offsets[user], np.zeros(len(user), np.int64)
        long = np.flatnonzero(log.user_offsets[user + 1] - begin > window)  # of other users there is one history
        first[long] = window_start(events_before(log, user[long], moment[long]) - begin[long], window)
        return user.astype(np.int64) * (len(log) + 1) + first

    def draw(self, step: int, histories: int, most: int) -> Drawn:
        """The ``histories`` of a step, with at most ``most`` requests of each, drawn at random, and all verdicts."""
        seed = self.engine.config.train.seed
        rows = epoch_rows(seed, self.name, step, self.size, histories)
        requests, owner = _members(self.request_rows, self.request_offsets, rows)
        lot = task_rng(seed, f"requests of {self.name}", step).random(len(requests))
        order = np.lexsort((lot, owner))
        place = np.arange(len(owner)) - np.searchsorted(owner, owner)
        chosen = np.sort(order[place < most])  # by history and moment again
        return Drawn(rows, requests[chosen], owner[chosen], *_members(self.group_rows, self.group_offsets, rows))

    def read(self, drawn: Drawn, micro_batch: MicroBatch, views: np.ndarray) -> tuple[Histories, np.ndarray]:
        """The micro-batch's histories, each through its view uint8 [H] of ``views``, with the prior of its requests;
        and the branches of its verdicts' groups, int64 [G]."""
        _, mine, groups = drawn.part(micro_batch)
        requests, asked = drawn.requests[mine], drawn.groups[groups]
        history = np.concatenate([drawn.request_history[mine], drawn.group_history[groups]])
        user = np.concatenate([self.requests.user[requests], self.candidates.user[asked]])
        moment = np.concatenate([self.request_moment[requests], self.candidates.moment[asked]])
        order = np.lexsort((moment, history))
        place = np.argsort(order)
        is_request = order < len(requests)
        built = self.engine.histories.build(user[order], moment[order], views[history[order]], is_request)
        return built.with_prior() if len(requests) else built, place[len(requests) :]


def _by_history(keys: np.ndarray, key: np.ndarray, moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by history and moment, and the offsets of every history of ``keys``."""
    order = np.lexsort((moment, key))
    return order, np.append(np.searchsorted(key[order], keys), len(order))


def _members(rows: np.ndarray, offsets: np.ndarray, histories: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of ``histories`` one after the other, and the place of each one's history."""
    counts = np.diff(offsets)[histories]
    owner = np.repeat(np.arange(len(histories)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows[offsets[histories][owner] + within], owner
