"""A run that goes on: events of a moment ago count in the next answer.

A live run starts from the state at its data set's end and learns one event after the other: features follow in the C++
engine, and a user's history, whose keys and values are kept, is extended by its new positions.
"""

import time as clock
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, WITHDRAWN
from negfast.data.shards import START, gap_bucket
from negfast.errors import InputError
from negfast.model.histories import HistoryBuilder, item_text, window_start
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.serve.context import Moment, time_of
from negfast.serve.ids import Column, indices
from negfast.serve.score import NEVER, FirstKnown, Scores

if TYPE_CHECKING:
    from negfast.runtime.engine import Engine
    from negfast.runtime.verdict import Calibration

FEEDBACK = {"shown": EXPOSED, "like": LIKE, "dislike": DISLIKE, "withdrawn": WITHDRAWN}
KEPT_BYTES = 512 << 20  # of histories; that of the user who was asked about longest ago goes first
OBJECT_BYTES = 14 << 10  # of a history, beside keys and values


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
        self.builder = copy(self.engine.histories)  # to which new items are added
        self.histories: OrderedDict[int, _History] = OrderedDict()  # the last one that was asked about is last
        self.kept_bytes = 0
        self.codes = self.engine.data.codes
        self.added = _Added(len(self.users))
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
            self.added.add_user()
            self.features.add_users([user])
        u, i, code = self.users[user], self.items[item], FEEDBACK[feedback]
        self.features.state.add(u, i, time, code, np.nan if value is None else value)
        self.added.add(u, i, code, time)
        if (history := self.histories.get(u)) is not None:
            history.add([(i, code, time)])
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
        policy, builder, device = self.engine.policy, self.builder, self.engine.device
        history = self._history(user)
        layout, gap = history.before(moment, policy, builder)
        of = torch.from_numpy(items).to(device).long()
        tokens = builder.candidate_tokens(of, torch.full_like(of, builder.vocabulary.marker("gap-0") + gap))
        layout.ask(np.zeros(len(items), np.int64))
        hidden = policy.hidden(layout, None, tokens, completion_item_text=builder.text_of(of))
        self._keep(history)
        features = torch.from_numpy(self.features.state.answer(user, items, moment)).to(device)
        logits = policy.verdict_logit(hidden.view(*tokens.shape[:2], -1)[:, -1], features)
        return logits.double().cpu().numpy()

    def _history(self, user: int) -> "_History":
        if (history := self.histories.get(user)) is None:
            stored = user < self.builder.shard.n_users
            _, item, feedback, time = self.builder.shard.get_many(np.array([user] if stored else [], np.int32))
            history = self.histories[user] = _History(item, feedback, time)
            history.add(self.added.of(user))
        self.histories.move_to_end(user)
        return history

    def _keep(self, newest: "_History") -> None:
        """Counts what the newest history keeps now, and drops the oldest ones where all keep more than KEPT_BYTES."""
        self.kept_bytes += newest.measure()
        while self.kept_bytes > KEPT_BYTES and len(self.histories) > 1:
            self.kept_bytes -= self.histories.popitem(last=False)[1].kept_bytes

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
        texts = None if self.builder.item_vectors is None else item_text(data, vectors)
        self.builder.add_items(codes, None if texts is None else texts[-1:])
        self.features.add_items(new)
        self.items[item] = len(self.items)
        self.item_since.append(NEVER)


class _Added:
    """Users' events since the data set's end, 17 bytes each and 4 a user."""

    def __init__(self, users: int) -> None:
        self.newest = array("i", [-1]) * users  # of each user, the place of the last event
        self.item, self.feedback, self.time, self.before = array("i"), array("B"), array("q"), array("i")

    def add_user(self) -> None:
        self.newest.append(-1)

    def add(self, user: int, item: int, feedback: int, time: int) -> None:
        self.before.append(self.newest[user])
        self.newest[user] = len(self.item)
        self.item.append(item)
        self.feedback.append(feedback)
        self.time.append(time)

    def of(self, user: int) -> list[tuple[int, int, int]]:
        """A user's item, feedback and time, in the order in which they were added."""
        events, place = [], self.newest[user]
        while place >= 0:
            events.append((self.item[place], self.feedback[place], self.time[place]))
            place = self.before[place]
        return events[::-1]


@dataclass
class _History:
    """A user's events, and the keys and values of the positions of a window of them."""

    item: np.ndarray  # int32 [N]
    feedback: np.ndarray  # uint8 [N]
    time: np.ndarray  # int64 [N], seconds, ascending
    first: int = -1  # event of the window
    end: int = 0  # events whose positions are computed
    layout: GroupLayout | None = None
    kept_bytes: int = 0

    def add(self, events: list[tuple[int, int, int]]) -> None:
        """Events as item, feedback and time. Those of the newest moment may come in any order: they are put in that of
        time, as a log is sorted."""
        if events:
            item, feedback, time = zip(*events, strict=True)
            self.time = np.append(self.time, np.array(time, np.int64))
            order = np.argsort(self.time, kind="stable")
            self.time = self.time[order]
            self.item = np.append(self.item, np.array(item, np.int32))[order]
            self.feedback = np.append(self.feedback, np.array(feedback, np.uint8))[order]

    def before(self, moment: int, policy: Policy, builder: HistoryBuilder) -> tuple[GroupLayout, int]:
        """The layout of one prompt, the positions of the events before ``moment``, no earlier than the last; and the
        bucket of the time since these."""
        end = int(np.searchsorted(self.time, moment))
        first = int(window_start(np.array([end]), builder.config.window)[0])
        if self.layout is None or first != self.first:  # a new window: it starts anew
            tokens, text = builder.tokens_of(*self._positions(first, first, end, begins=True))
            self.layout = GroupLayout.build(np.array([0, len(tokens)]), tokens.device)
            policy.hidden(self.layout, tokens, None, prompt_item_text=text)
        elif end > self.end:
            tokens, text = builder.tokens_of(*self._positions(first, self.end, end, begins=False))
            self.layout.ask(np.zeros(1, np.int64))
            policy.hidden(self.layout, None, tokens[None], completion_item_text=None if text is None else text[None])
            self.layout = self.layout.grown()
        self.first, self.end = first, end
        return self.layout, int(gap_bucket(np.asarray(moment - self.time[end - 1]))) if end > first else 0

    def measure(self) -> int:
        """Keeps nothing but keys and values; how many bytes more than when it was measured last."""
        assert self.layout is not None
        self.layout.forget()
        before, self.kept_bytes = self.kept_bytes, OBJECT_BYTES + self.layout.bytes
        return self.kept_bytes - before

    def _positions(self, window: int, first: int, end: int, begins: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Item, feedback and gap of the positions of events first to end, behind a start where the window begins."""
        gap = np.zeros(end - first, np.uint8)
        gap[int(first == window) :] = gap_bucket(np.diff(self.time[max(first - 1, window) : end]))
        item, feedback = self.item[first:end], self.feedback[first:end]
        if begins:
            return np.insert(item, 0, -1), np.insert(feedback, 0, START), np.insert(gap, 0, 0)
        return item, feedback, gap
