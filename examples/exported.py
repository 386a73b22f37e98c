"""A directory of `negfast export`, read without negfast: users' histories, what is known of them, the trie.

The examples for transformers and vLLM share it.
"""

import csv
import json
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from features import DAY, NEVER, WITHDRAWN, Features, key_of
from safetensors.numpy import load_file

FORMAT, LAYOUT = 6, "events"  # of negfast.json: one position an event
FEEDBACK = ("shown", "like", "dislike", "withdrawn")  # the codes 0 to 3


def read_csv(path: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a CSV with a header; these ``columns`` must be among its own."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        for column in columns:
            if column not in (rows.fieldnames or []):
                raise SystemExit(f"{path}: found no column {column!r}, expected {', '.join(columns)}")
        return list(rows)


class Event(NamedTuple):
    item: int  # row of the export's items
    feedback: int
    time: int  # seconds since 1970, UTC
    value: float  # NaN: none


class Export:
    def __init__(self, folder: Path) -> None:
        self.folder, self.about = folder, json.loads((folder / "negfast.json").read_text())
        found = self.about.get("format"), self.about.get("layout")
        if found != (FORMAT, LAYOUT):
            raise SystemExit(f"{folder}: found an export of format and layout {found}, expected {(FORMAT, LAYOUT)}")
        self.tokens = self.about["tokens"]
        items = json.loads((folder / "items.json").read_text("utf-8"))
        self.items, self.texts = items["id"], items["text"]
        self.item_row = {name: row for row, name in enumerate(self.items)}
        self.trie = load_file(folder / "trie.safetensors")
        self.events: dict[str, list[Event]] = defaultdict(list)  # of users, in order of time

    # ---- Users, who are given by their events.

    def read_events(self, path: Path) -> None:
        """CSV with the columns user, item, time (s), feedback, and value in a log with values; events of one second in
        the log's order."""
        for line, row in enumerate(read_csv(path, "user", "item", "time", "feedback"), start=2):
            if row["item"] not in self.item_row:
                raise SystemExit(f"{path}:{line}: found item {row['item']!r}, expected one of items.json")
            if row["feedback"] not in FEEDBACK:
                raise SystemExit(f"{path}:{line}: found feedback {row['feedback']!r}, expected {', '.join(FEEDBACK)}")
            feedback, value = FEEDBACK.index(row["feedback"]), float(row.get("value") or "nan")
            self.events[row["user"]].append(Event(self.item_row[row["item"]], feedback, int(row["time"]), value))
        for events in self.events.values():
            events.sort(key=lambda event: event.time)

    def moment(self, at: int | None, of_lists: bool) -> int:
        """The second before which events count: by default the export's, the end of its log's last day. Lists, and in
        the context "day" scores too, look at whole days."""
        at = self.about["moment"] if at is None else at
        if at < self.about["moment"]:
            raise SystemExit(f"--at: found {at}, expected {self.about['moment']} or later, the moment of the export")
        return at // DAY * DAY if of_lists or self.about["history"]["context"] == "day" else at

    def before(self, user: str, moment: int) -> list[Event]:
        return [event for event in self.events[user] if event.time < moment]

    def positions(self, user: str, moment: int) -> tuple[list[list[int]], int]:
        """The tokens whose embeddings are summed at each position of a history, a start and the latest events, and the
        token of the time from the last event to the moment. What is asked follows them."""
        tokens, history, events = self.tokens, self.about["history"], self.before(user, moment)
        stride = history["window"] - history["window"] // 4
        first = max(-(-(len(events) - history["window"]) // stride), 0) * stride
        sums, gap, before = [[tokens["history"], tokens["gap-0"]]], tokens["gap-0"], None
        for event in events[first:]:
            gap = tokens["gap-0"] if before is None else self._gap(event.time - before)
            sums.append([*self.trie["tokens"][event.item].tolist(), tokens[FEEDBACK[event.feedback]], gap])
            before = event.time
        return [self.padded(position) for position in sums], gap if before is None else self._gap(moment - before)

    def padded(self, position: list[int]) -> list[int]:
        """With <|none|>, whose embedding is zero, in the places that are left."""
        return position + [self.tokens["none"]] * (self.about["levels"] + 2 - len(position))

    def _gap(self, seconds: int) -> int:
        return self.tokens["gap-0"] + min(self.about["history"]["gaps"] - 1, 1 + (seconds // 64).bit_length())

    # ---- The verdict.

    def known(self, asked: set[str], moment: int) -> tuple[Features, dict[str, int]]:
        """The features' state, and the users' rows in it. Users of the log who are ``asked`` about must be given by all
        of their events; those that the state has not seen are learned in order of moment, as are all of new users."""
        names = json.loads((self.folder / "users.json").read_text("utf-8"))["id"]
        rows = {name: row for row, name in enumerate(names)}
        tables = {name: table.copy() for name, table in load_file(self.folder / "features.safetensors").items()}
        state = Features(self.about["features"], tables, list(map(key_of, names)), list(map(key_of, self.items)))
        unit = DAY if self.about["history"]["context"] == "day" else 1
        learned, later = state.learned, []
        new = [user for user in self.events if user not in rows]
        rows |= zip(new, state.add_users([key_of(user) for user in new]), strict=True)
        for user in self.events.keys() | (asked & rows.keys()):
            events = [event for event in self.before(user, moment) if event.feedback]
            if rows[user] < len(names):
                old = [event for event in events if event.time // unit * unit <= learned]
                said = state.said[rows[user]] = {event.item: (event.feedback, event.value) for event in old}
                found = sum(feedback != WITHDRAWN for feedback, _ in said.values())
                if found != (expected := state.user["sums.count"][rows[user]]):
                    raise SystemExit(
                        f"events of {user} in the log: found {found} judged items, expected {expected:.0f}"
                    )
                events = events[len(old) :]
            later += [(event.time // unit * unit, key_of(user), event.time, rows[user], event) for event in events]
        later.sort(key=lambda event: event[:3])
        for at, some in groupby(later, key=lambda event: event[0]):
            state.learn(at, [(row, event.item, event.feedback, event.value) for *_, row, event in some])
        return state, rows

    def is_known(self, user: str, items: np.ndarray, state: Features, moment: int) -> np.ndarray:
        """Whether anything is known of the user or of each item: otherwise negfast abstains."""
        first = state.item["first"][items]
        return (first != NEVER) & (first < moment) | bool(self.before(user, moment))

    def verdict(self, features: np.ndarray) -> np.ndarray:
        """Logits [E] of features [E, C]: the mean of what networks and trees say."""
        weights, features = load_file(self.folder / "verdict.safetensors"), features.astype(np.float32)
        return (networks(weights, features) + trees(weights, features)) / 2

    def probability(self, logit: np.ndarray, given: str) -> np.ndarray:
        """P(dislike | feedback) or P(dislike | shown)."""
        if (calibration := self.about["calibration"][given]) is None:
            raise SystemExit(f"--given {given}: the run has no such calibration, as its log has no exposures")
        return 1 / (1 + np.exp(-(calibration["slope"] * logit + calibration["intercept"])))


def networks(weights: dict[str, np.ndarray], features: np.ndarray) -> np.ndarray:
    """A linear part and the mean of small networks, over the features' piecewise-linear encoding."""
    low, width = weights["edges"][:, :-1], np.diff(weights["edges"], axis=1)
    unknown = np.isnan(features)[..., None]
    place = np.clip((features[..., None] - low) / np.where(width > 0, width, np.inf), 0, 1)
    encoded = np.concatenate([np.where(unknown, 0, place), unknown], axis=-1).reshape(len(features), -1)
    second, last = weights["second"], weights["last"]
    hidden = np.maximum(encoded @ weights["first.weight"].T + weights["first.bias"], 0)
    hidden = np.einsum("emi,mio->emo", hidden.reshape(len(hidden), *second.shape[:2]), second)
    deep = (np.maximum(hidden + weights["second_bias"], 0) * last).sum(-1)
    return (encoded @ weights["wide.weight"].T + weights["wide.bias"])[:, 0] + deep.mean(-1)


def trees(weights: dict[str, np.ndarray], features: np.ndarray) -> np.ndarray:
    """The sum of the trees' leaves: of a tree, the first that no split rules out."""
    names = "feature", "threshold", "unknown_right", "left_leaves", "value"
    feature, threshold, unknown_right, left_leaves, value = (weights[f"trees.{name}"] for name in names)
    left = np.full((len(features), len(feature)), -1)  # bit l: leaf l
    for split in range(feature.shape[1]):
        asked = features[:, feature[:, split]]
        right = (asked > threshold[:, split]) | (np.isnan(asked) & unknown_right[:, split])
        left &= ~(right * left_leaves[:, split])
    leaf = np.log2(left & -left).astype(int)  # the lowest bit
    return value[np.arange(len(feature)), leaf].sum(1, dtype=float)


class Walk:
    """Down the trie to the items that a user has not seen, by the community prior."""

    def __init__(self, export: Export, seen: set[int]) -> None:
        """``seen`` are rows of items that must not be generated."""
        about, trie = export.about, export.trie
        self.levels, self.codebook, self.first_code = about["levels"], about["codebook"], about["tokens"]["codes"]
        self.trie, nodes, prior = trie, trie["item_nodes"], about["prior"]
        left = ~np.isin(np.arange(len(nodes)), list(seen))
        mass_of_seen = trie[f"mass.{self.levels}"][0][nodes[:, -1]] * ~left  # after the branch of dislikes
        self.open, self.log_prior = [], []  # of each level's nodes
        for level in range(self.levels):
            mass = trie[f"mass.{level + 1}"][0]
            unseen = np.bincount(nodes[:, level], left, len(mass))
            mass = np.maximum(mass - np.bincount(nodes[:, level], mass_of_seen, len(mass)), 0) + prior["eps"] * unseen
            self.open.append(unseen > 0)
            self.log_prior.append(prior["weight"] * np.log(np.where(unseen > 0, mass, 1)))

    def next(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may follow the completion ``tokens``, and the logarithms of their community prior."""
        codes, nodes = self._children(tokens)
        open_ = self.open[len(tokens)][nodes]
        return codes[open_], self.log_prior[len(tokens)][nodes[open_]]

    def item(self, tokens: list[int]) -> int:
        """The row of the item that a whole completion names."""
        codes, nodes = self._children(tokens[:-1])
        return int(self.trie["leaf_item"][nodes[codes == tokens[-1]][0]])

    def _children(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and nodes below a completion; none below one that does not exist."""
        node = 0
        for level in range(len(tokens) + 1):
            bits = np.unpackbits(self.trie[f"child_bits.{level}"][node].view(np.uint8), bitorder="little")
            codes = np.flatnonzero(bits) + self.first_code + level * self.codebook
            nodes = self.trie[f"first_child.{level}"][node] + np.arange(len(codes))
            if level < len(tokens):
                found = nodes[codes == tokens[level]]
                if not len(found):
                    return codes[:0], nodes[:0]
                node = int(found[0])
        return codes, nodes
