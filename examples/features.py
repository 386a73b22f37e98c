"""The features of negfast's verdict in numpy: what the past says of users, items and pairs.

It reads and continues the tables of an export, without negfast, whose tests hold the C++ engine (csrc/features.cpp)
against it. What the columns mean is in negfast/data/features.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

LIKE, DISLIKE, WITHDRAWN = 1, 2, 3
NEVER = np.iinfo(np.int64).min  # the moment of what has not happened
DAY = 86_400  # seconds
Row = dict[str, Any]


class Features:
    """A state of users and items that answers, and to which events can be added. Users and items are row numbers."""

    def __init__(
        self, spec: dict[str, Any], tables: dict[str, np.ndarray], user_keys: Sequence[int], item_keys: Sequence[int]
    ) -> None:
        """``spec`` is "features" of negfast.json, ``tables`` those of its safetensors, keys are `key_of` ids."""
        self.spec, self.constants = spec, spec["constants"]
        self.user, self.item, self.cell, self.value, self.values_of = (
            {name.removeprefix(kind): table for name, table in tables.items() if name.startswith(kind)}
            for kind in ("user.", "item.", "cell.", "value.", "values_of.")
        )
        self.user_keys, self.item_keys = list(user_keys), item_keys
        self.lately, self.learned = float(tables["lately"][0]), int(tables["learned"][0])
        # (item, residual) of users, ~item where it is not the first of its pair, and (user, residual) of items
        self.judgements, self.judges = (_lists(tables, name) for name in ("judgements", "judges"))
        # of users who are asked about or judge: item -> last like, dislike or withdrawal, and its value
        self.said: dict[int, dict[int, tuple[int, float]]] = defaultdict(dict)

    # ---- Answers.

    def columns(self, user: int, items: np.ndarray, moment: int) -> np.ndarray:
        """float64 [E, width] of a user and ``items`` int [E] at a ``moment`` (seconds) after all that was learned; NaN
        where a column is not known. ``said`` must have the user's judgements."""
        u = {name: table[user].astype(float) for name, table in self.user.items()}
        i = {name: table[items].astype(float) for name, table in self.item.items()}
        found = self._rates(u, i) | self._attributes(user, items) | self._deviations(u, i, moment)
        found |= self._like_users(user, items) | self._of_text(user, i) | self._evidence(u, i, moment)
        if missing := [name for name in self.spec["names"] if name not in found]:
            raise ValueError(f"features: found {missing[0]!r}, which is not known here")
        return np.stack([np.broadcast_to(found[name], len(items)) for name in self.spec["names"]], axis=1)

    def _rates(self, u: Row, i: Row) -> Row:
        out = {}
        for side, s in (("user", u), ("item", i)):
            out[f"{side}_logit_rate"] = logit(self._rate(s["sums.dislikes"], s["sums.count"]))
            out[f"{side}_log_events"] = np.log1p(s["sums.count"])
            count, total = s["sums.value_count"], s["sums.value"]
            out[f"{side}_mean_value"] = self._mean(total, count, self.spec["prior_value"])
            known = np.maximum(count, 1)
            variance = s["sums.value_square"] / known - (total / known) ** 2
            out[f"{side}_spread"] = np.where(count < 2, np.nan, np.sqrt(np.maximum(variance, 0)))
        return out

    def _attributes(self, user: int, items: np.ndarray) -> Row:
        """The user's and everyone's dislike rates of the items' attribute values, and what shows the values."""
        names, attributes = self.spec["names"], self.spec["attributes"]
        starts, numbers = self.values_of["start"], self.values_of["value"]
        count, dislikes = np.zeros((2, len(self.value["count"])))
        for item, (feedback, _) in self.said[user].items():
            if feedback != WITHDRAWN:
                values = numbers[starts[item * len(attributes)] : starts[(item + 1) * len(attributes)]]
                np.add.at(count, values, 1)
                np.add.at(dislikes, values, feedback == DISLIKE)
        by_user, by_all = self._rate(dislikes, count), self._rate(self.value["dislikes"], self.value["count"])
        out: Row = {}
        for number, attribute in enumerate(attributes):
            missing = np.nan if attribute["missing"] is None else attribute["missing"]
            columns = np.full((len(items), 2 + attribute["columns"]), missing)
            columns[:, :2] = np.nan
            for row, item in enumerate(items):
                place = item * len(attributes) + number
                values = numbers[starts[place] : starts[place + 1]]
                if len(values):
                    columns[row, :2] = by_user[values].mean(), by_all[values].mean()
                shown = values[self.value["column"][values] >= 0]
                columns[row, 2 + self.value["column"][shown]] = self.value["content"][shown]
            first = names.index(f"{attribute['name']}:user_rate")
            out |= dict(zip(names[first : first + columns.shape[1]], columns.T, strict=True))
        return out

    def _deviations(self, u: Row, i: Row, moment: int) -> Row:
        out: Row = {}
        for kind, sums, count in (
            ("dislike", "sums.dislike", "sums.count"),
            ("value", "sums.of_value", "sums.value_count"),
        ):
            for side, s in (("user", u), ("item", i)):
                out[f"{kind}_{side}"] = self._mean(s[f"{sums}.excess"], s[count], 0)
                kept = halved(moment - s["sums.at"], self.constants["half_life"])
                events = np.maximum(s[f"{sums}.recent_count"] * kept, 0)  # withdrawals of older ones: below 0
                pseudo_events = self.constants["recent_pseudo_events"]
                out[f"{kind}_recent_{side}"] = s[f"{sums}.recent_excess"] * kept / (events + pseudo_events)
            out[f"{kind}_sum"] = out[f"{kind}_user"] + out[f"{kind}_item"]
            out[f"{kind}_user_off"] = u[f"{sums}.absolute"] / (u[count] + 1)
        kept = halved(moment - u["sums.at"], self.constants["count_half_life"])
        return out | {"user_log_recent": np.log1p(max(u["sums.recent_events"] * kept, 0))}

    def _like_users(self, user: int, items: np.ndarray) -> Row:
        """The items' last judgements, weighed by how alike their judges judged what the user judged."""
        square, likeness = self.user["square"], defaultdict(float)
        for item, own in self.judgements[user]:
            for judge, residual in self.judges[max(item, ~item)]:
                likeness[judge] += own * residual
        likeness[user] = 0
        cosine = {
            judge: total / (np.sqrt(square[user] * square[judge]) + self.constants["alike_length"])
            for judge, total in likeness.items()
        }
        weighed = [[(cosine.get(judge, 0), residual) for judge, residual in self.judges[item]] for item in items]
        total = np.array([sum(weight * residual for weight, residual in some) for some in weighed])
        weight = np.array([sum(abs(weight) for weight, _ in some) for some in weighed])
        return {"like_users_sum": total, "like_users_mean": total / (weight + self.constants["alike_weight"])}

    def _of_text(self, user: int, i: Row) -> Row:
        """How the user judged texts like those of the items."""
        judged, constants = self.judgements[user], self.constants
        text = self.item["text"].astype(float)
        last = judged[-int(constants["recent"]) :]
        kernel = np.maximum(i["text"] @ text[[max(item, ~item) for item, _ in last]].T, 0) ** 3
        weight = kernel.sum(1)
        ridge, first = int(constants["ridge"]), [(item, residual) for item, residual in judged if item >= 0]
        x, y = text[[item for item, _ in first], :ridge], np.array([residual for _, residual in first])
        weights = np.linalg.solve(x.T @ x + constants["penalty"] * np.eye(ridge), x.T @ y)
        return {
            "text_weight": weight,
            "text_mean": kernel @ [residual for _, residual in last] / (weight + constants["text_weight"]),
            "text_ridge": i["text"][:, :ridge] @ weights,
        }

    def _evidence(self, u: Row, i: Row, moment: int) -> Row:
        constants, out = self.constants, {"factors": i["factors"] @ u["factors"]}
        for name, cell in zip(("coarse", "fine"), i["cell"].T.astype(int), strict=True):
            count = self.cell["count"][cell] + constants["cell_pseudo_events"]
            out[f"cell_{name}"] = self.cell["excess"][cell] / count
        out |= {"user_lately": u["sums.lately"], "item_lately": i["sums.lately"], "lately": self.lately}
        for name, at in (("judged", u["last"]), ("dislike", u["last_dislike"]), ("item_first", i["first"])):
            out[f"days_since_{name}"] = np.where(at == NEVER, np.nan, (moment - at) / DAY)
        return out

    # ---- New users and events.

    def add_users(self, keys: Sequence[int]) -> range:
        """The rows of new users."""
        rows = [self.unknown(self.user, 2 * key + 1) for key in keys]
        for name in self.user:
            self.user[name] = np.concatenate([self.user[name], *(row[name][None] for row in rows)])
        self.user_keys.extend(keys)
        self.judgements += [[] for _ in keys]
        return range(len(self.user_keys) - len(keys), len(self.user_keys))

    def unknown(self, table: Row, seed: int) -> Row:
        """The row of a user or item without events; ``seed`` is 2 * key, of users + 1."""
        row = {name: np.zeros(column.shape[1:], column.dtype) for name, column in table.items()}
        for name in {"sums.at", "last", "last_dislike", "first"} & row.keys():
            row[name][...] = NEVER
        row["sums.lately"][...] = self.spec["prior_rate"]
        row["factors"][...] = first_factors(seed, len(row["factors"]), self.constants["start"])
        return row

    def learn(self, moment: int, events: Sequence[tuple[int, int, int, float]]) -> None:
        """Events of one moment as (user, item, feedback, value or NaN), sorted by the users' keys, then by time. They
        see nothing of each other. Those older than what was learned meet today's rates, and weigh what is left of them.
        """
        changes = [self._change(*event) for event in events]
        for (user, item, feedback, _), change in zip(events, changes, strict=True):
            self._learn(user, item, feedback, moment, change)
        self.learned = max(self.learned, moment)

    def _change(self, user: int, item: int, feedback: int, value: float) -> Row:
        """What an event says, as a change to what the pair said before, and what was expected of it."""
        before, old = self.said[user].get(item, (None, np.nan))
        value = np.nan if feedback == WITHDRAWN else value
        self.said[user][item] = feedback, value
        judged = int(feedback != WITHDRAWN) - int(before in (LIKE, DISLIKE))
        dislikes = int(feedback == DISLIKE) - int(before == DISLIKE)
        new, gone = (np.array([1, x, x * x]) if np.isfinite(x) else np.zeros(3) for x in (value, old))
        prior_rate, prior_value = self.spec["prior_rate"], self.spec["prior_value"]
        u, i = ({name: float(column[row]) for name, column in table.items() if name.startswith("sums.")}
                for table, row in ((self.user, user), (self.item, item)))  # fmt: skip
        user_rate, item_rate = (self._rate(s["sums.dislikes"], s["sums.count"]) for s in (u, i))
        expected = 1 / (1 + np.exp(logit(prior_rate) - logit(user_rate) - logit(item_rate)))  # odds of both multiplied
        return {
            "dislike": (judged, dislikes),
            "value": (new - gone)[:2],
            "value_square": (new - gone)[2],
            "residual": dislikes - expected * judged,
            "is_first": before is None and feedback != WITHDRAWN,
            "of_item": (item_rate, self._mean(i["sums.value"], i["sums.value_count"], prior_value)),
            "of_user": (
                prior_rate + self._mean(u["sums.dislike.excess"], u["sums.count"], 0),
                prior_value + self._mean(u["sums.of_value.excess"], u["sums.value_count"], 0),
            ),
        }

    def _learn(self, user: int, item: int, feedback: int, moment: int, change: Row) -> None:
        u, i, r = self.user, self.item, change["residual"]
        for judged, other, most in (
            (self.judgements[user], item if change["is_first"] else ~item, self.constants["judgements"]),
            (self.judges[item], user, self.constants["judges"]),
        ):
            judged.append((other, r))
            del judged[: -int(most)]
        u["square"][user] += r * r
        if change["is_first"]:
            self._factorise(user, item, r)
        self._count(u, user, moment, change, change["of_item"])
        self._count(i, item, moment, change, change["of_user"])
        judged, dislikes = change["dislike"]
        for cell in i["cell"][item]:
            self.cell["count"][cell] += judged
            self.cell["excess"][cell] += dislikes - self.spec["prior_rate"] * judged
        attributes = len(self.spec["attributes"])
        start, end = self.values_of["start"][[item * attributes, (item + 1) * attributes]]
        for value in self.values_of["value"][start:end]:
            self.value["count"][value] += judged
            self.value["dislikes"][value] += dislikes
        if feedback == WITHDRAWN:
            return
        is_dislike = float(feedback == DISLIKE)
        for table, row in ((u, user), (i, item)):
            table["sums.lately"][row] += self.constants["lately"] * (is_dislike - table["sums.lately"][row])
        self.lately += self.constants["lately_all"] * (is_dislike - self.lately)
        u["last"][user] = max(u["last"][user], moment)
        if feedback == DISLIKE:
            u["last_dislike"][user] = max(u["last_dislike"][user], moment)
        first = i["first"][item]
        i["first"][item] = moment if first == NEVER else min(first, moment)

    def _factorise(self, user: int, item: int, residual: float) -> None:
        """A gradient step."""
        step, shrink = self.constants["step"], self.constants["shrink"]
        p, q = self.user["factors"][user].astype(float), self.item["factors"][item].astype(float)
        along = step * (residual - p @ q) / (1 + step * (p @ p + q @ q))
        self.user["factors"][user] = p + along * q - step * shrink * p
        self.item["factors"][item] = q + along * p - step * shrink * q

    def _count(self, table: Row, row: int, moment: int, change: Row, expected: tuple[float, float]) -> None:
        """Adds a change to the sums of a user or an item, of which ``expected`` were the rate and the value."""
        at = int(table["sums.at"][row])
        now = max(at, moment)
        half_life, count_half_life = self.constants["half_life"], self.constants["count_half_life"]
        for kind, sums, mean in zip(("dislike", "value"), ("sums.dislike", "sums.of_value"), expected, strict=True):
            count, total = change[kind]
            excess = total - count * mean
            table[f"{sums}.excess"][row] += excess
            table[f"{sums}.absolute"][row] += count * abs(excess)
            for name, what in (("recent_count", count), ("recent_excess", excess)):
                recent = table[f"{sums}.{name}"]
                recent[row] = recent[row] * halved(now - at, half_life) + what * halved(now - moment, half_life)
        judged, dislikes = change["dislike"]
        recent = table["sums.recent_events"]
        recent[row] = recent[row] * halved(now - at, count_half_life) + judged * halved(now - moment, count_half_life)
        table["sums.count"][row] += judged
        table["sums.dislikes"][row] += dislikes
        table["sums.value_count"][row] += change["value"][0]
        table["sums.value"][row] += change["value"][1]
        table["sums.value_square"][row] += change["value_square"]
        table["sums.at"][row] = now

    def _mean(self, total: Any, count: Any, prior: float) -> Any:
        return (total + self.constants["pseudo_events"] * prior) / (count + self.constants["pseudo_events"])

    def _rate(self, dislikes: Any, count: Any) -> Any:
        return self._mean(dislikes, count, self.spec["prior_rate"])


def logit(rate: Any) -> Any:
    rate = np.clip(rate, 1e-6, 1 - 1e-6)
    return np.log(rate / (1 - rate))


def halved(seconds: Any, half_life: float) -> Any:
    """What is left of 1 after so many seconds."""
    return 0.5 ** (seconds / half_life)


def _lists(tables: dict[str, np.ndarray], name: str) -> list[list[tuple[int, float]]]:
    start, other, residual = (tables[f"{name}.{part}"].tolist() for part in ("start", "other", "residual"))
    pairs = list(zip(other, residual, strict=True))
    return [pairs[begin:end] for begin, end in pairwise(start)]


def key_of(name: str) -> int:
    """The number of a user's or an item's id, from which its first factors come."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def mixed(x: int) -> int:
    """SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def first_factors(seed: int, width: int, size: float) -> np.ndarray:
    start = mixed(seed % 2**64)
    draws = [mixed(2**64 - 1 - (start + lane) % 2**64) >> 40 for lane in range(width)]
    return size * (np.array(draws) / 2**24 - 0.5)
