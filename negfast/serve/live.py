"""A run that goes on: events of a moment ago count in the next answer.

A live run starts from the state at its data set's end and learns one event after the other: the features of the verdict
follow in the C++ core.
"""

import time as clock
from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, WITHDRAWN
from negfast.errors import InputError
from negfast.serve.context import Moment, time_of
from negfast.serve.ids import Column, indices
from negfast.serve.score import NEVER, FirstKnown, Scores

if TYPE_CHECKING:
    from negfast.runtime.engine import Engine
    from negfast.runtime.verdict import Calibration

FEEDBACK = {"shown": EXPOSED, "like": LIKE, "dislike": DISLIKE, "withdrawn": WITHDRAWN}


class Live:
    """A run's state at its data set's end, to which events can be added; `Run.live` makes one.

    Questions and events have moments, which only go forward. In a run of context "event" a moment is a second: an
    answer sees the events of the seconds before it. In context "day" it is a day, and an answer sees the days before.
    For one thread at a time.
    """

    def __init__(
        self,
        engine: "Engine",
        calibration: "Calibration",
        users: Mapping[str, int],
        items: Mapping[str, int],
        known: FirstKnown,
    ) -> None:
        """Of the engine's data set: the index of each id of ``users`` and ``items``, and since when they are known."""
        self.engine, self.calibration = engine, calibration
        self.users, self.items = dict(users), dict(items)
        self.user_since, self.item_since = array("q", known.of_user[:-1]), array("q", known.of_item[:-1])
        self.features = self.engine.features.live()
        self.codes = self.engine.data.codes
        self.data_until = int(self.engine.log.time.max())
        self.since = self.moment(self.data_until)  # what has an earlier moment comes too late

    def moment(self, time: int) -> int:
        """The moment of a time, both in seconds since 1970."""
        return time if self.engine.config.history.context == "event" else time // DAY * DAY

    def add(
        self, user: str, item: str, time: int, feedback: str, value: float | None = None, text: str | None = None
    ) -> None:
        """Adds an event at ``time`` (seconds since 1970, UTC); ``feedback`` is "shown", "like", "dislike" or
        "withdrawn".

        A new user becomes known by it, and a new item by its ``text``, which gives it a semantic ID. Raises
        `InputError` as `refusal` says.
        """
        if (reason := self.refusal(item, time, feedback, value, text)) is not None:
            raise InputError(reason)
        if item not in self.items:
            self._add_item(item, text or "")
        if user not in self.users:
            self.users[user] = len(self.users)
            self.user_since.append(NEVER)
            self.features.add_users([user])
        u, i, code = self.users[user], self.items[item], FEEDBACK[feedback]
        self.features.state.add(u, i, time, code, np.nan if value is None else value)
        self.user_since[u] = min(self.user_since[u], time)
        if code in (LIKE, DISLIKE):
            self.item_since[i] = min(self.item_since[i], time)
        self.since = max(self.since, self.moment(time))

    def refusal(
        self,
        item: str,
        time: int,
        feedback: str,
        value: float | None = None,
        text: str | None = None,
        since: int | None = None,
    ) -> str | None:
        """Why `add` would refuse an event, None where it would not; ``since`` is the moment of the newest one that will
        be added before it."""
        if feedback not in FEEDBACK:
            return f"feedback: found {feedback!r}, expected {', '.join(FEEDBACK)}"
        if item not in self.items and not text:
            return f"item {item!r}: is new, expected its text beside it"
        if value is not None and self.engine.log.value is None:
            return f"value: found {value}, expected none, as in the data set"
        since = self.since if since is None else since
        if self.moment(time) < since:
            return f"time: found {time}, expected {since} or later, as events come in their order"
        return None

    def score(self, users: str | Column, items: Column, at: Moment | None = None) -> Scores:
        """As `Run.score`, of the candidates of one user (an id), or of as many as there are items (a column).

        ``at`` is now by default. What was asked about is over: later events are not earlier than ``at``.
        """
        item = indices("item", items, self.items)
        if isinstance(users, str):
            user = np.full(len(item), self.users.get(users, -1))
        else:
            user = indices("user", users, self.users)
        if len(user) != len(item):
            raise InputError(f"users and items: found {len(user):,} and {len(item):,}, expected as many")
        if at is None:
            moment = max(self.since, self.moment(int(clock.time())))
        else:
            moment = self.moment(int(time_of(at).timestamp()))
        if moment < self.since:
            raise InputError(f"at: found {moment}, expected {self.since} or later, as moments go forward")
        self.since = moment
        since = (np.frombuffer(times, np.int64) for times in (self.user_since, self.item_since))
        known = np.logical_or(*(times[index] < moment for times, index in zip(since, (user, item), strict=True)))
        known &= (user >= 0) & (item >= 0)
        rows = np.flatnonzero(known)
        rows = rows[np.argsort(user[rows], kind="stable")]
        probability = np.full(len(user), np.nan)
        for part in np.split(rows, np.flatnonzero(np.diff(user[rows])) + 1) if len(rows) else []:
            logits = self._logits(int(user[part[0]]), item[part].astype(np.int32), moment)
            probability[part] = self.calibration.probability(logits)
        return Scores(probability, ~known)

    @torch.inference_mode()
    def _logits(self, user: int, items: np.ndarray, moment: int) -> np.ndarray:
        """Verdict logits float64 [E] of a user's candidates."""
        features = torch.from_numpy(self.features.state.answer(user, items, moment)).to(self.engine.device)
        return self.engine.policy.verdict(features).double().cpu().numpy()

    def _add_item(self, item: str, text: str) -> None:
        """Makes an item known as `negfast prepare --like` does: by its text, and codes of frozen codebooks."""
        from negfast.sid.assign import assign_new
        from negfast.sid.embed import embed_new
        from negfast.sid.quantize import Quantizer

        data, settings = self.engine.data, self.engine.data.manifest["semantic_ids"]
        original = data.manifest.get("original_items", len(data.items))
        new = ItemTable([item], [text], {name: [()] for name in data.items.attributes})
        vectors, cold = embed_new(data.items.take(range(original)), new, settings["report"]["blocks"], settings["seed"])
        codes = assign_new(vectors, cold, Quantizer.from_tensors(data.semantic_ids), self.codes)
        self.codes = np.concatenate([self.codes, codes])
        new = replace(new, vectors=vectors, codes=codes)
        self.features.add_items(new)
        self.items[item] = len(self.items)
        self.item_since.append(NEVER)
