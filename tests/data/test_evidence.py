"""Evidence against a plain reading of its definitions in float64, one event at a time."""

from dataclasses import replace

import numpy as np
import pytest

from negfast.data.evidence import Evidence
from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, WITHDRAWN, EventLog

USERS, ITEMS, EVENTS, PRIOR = 12, 15, 500, 0.3
SKETCH, TEXT, RIDGE, RECENT = 128, 32, 16, 32


def random_log(seed: int, users: int = USERS, items: int = ITEMS, events: int = EVENTS) -> EventLog:
    """Many events of one second, changed feedback, withdrawals and exposures."""
    rng = np.random.default_rng(seed)
    user, time = np.sort(rng.integers(0, users, events)), rng.integers(0, events // 3, events) * 700
    time = time[np.lexsort((time, user))]
    feedback = rng.choice([EXPOSED, LIKE, DISLIKE, WITHDRAWN], events, p=[0.1, 0.5, 0.3, 0.1]).astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))])
    return EventLog(offsets, rng.integers(0, items, events).astype(np.int32), feedback, time, None, items)


def random_items(seed: int, items: int = ITEMS) -> ItemTable:
    rng = np.random.default_rng(seed)
    vectors, codes = rng.normal(size=(items, 40)).astype(np.float32), rng.integers(0, 3, (items, 3)).astype(np.uint16)
    vectors[1] = 0  # an item without text
    return ItemTable([str(i) for i in range(items)], [""] * items, vectors=vectors, codes=codes)


def mixed(x: int) -> int:
    """SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def signs(number: int) -> np.ndarray:
    """The random signs of 2 * item or 2 * user + 1."""
    out = []
    for part in range(SKETCH // 16):
        bits = mixed(number * (SKETCH // 16) + part) >> 32
        out += [-1.0 if bits >> lane & 1 else 1.0 for lane in range(16)]
    return np.array(out) / np.sqrt(SKETCH)


def first_factors(number: int) -> np.ndarray:
    """Of 2 * item or 2 * user + 1."""
    mixes = [mixed(2**64 - 1 - (number * 16 + lane)) for lane in range(16)]
    return np.array([0.2 * ((x >> 40) / 2**24 - 0.5) for x in mixes])


def text_vectors(items: ItemTable) -> np.ndarray:
    assert items.vectors is not None
    centred = items.vectors[: items.original].astype(float)
    mean = centred.mean(0)
    axes = np.linalg.svd(centred - mean)[2][:TEXT]
    along = (items.vectors - mean) @ axes.T
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    return np.where(items.vectors.any(1, keepdims=True), along, 0)


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


class Reading:
    """All that is known after some events, read anew from their list: (user, item, time, r, r's change, ...)."""

    def __init__(self, log: EventLog, items: ItemTable) -> None:
        assert items.codes is not None
        self.text, self.codes = text_vectors(items), items.codes
        self.events: list[tuple[int, int, int, int]] = []  # user, item, time, feedback
        self.expected: dict[tuple[int, int], float] = {}
        self.residual: dict[tuple[int, int], float] = {}
        self.label: dict[tuple[int, int], int] = {}  # of the pairs that are judged now
        self.sketch_u, self.taste = np.zeros((2, log.n_users, SKETCH))
        self.sketch_i, self.opinion = np.zeros((2, log.n_items, SKETCH))
        self.weight_u, self.weight_i = np.zeros(log.n_users), np.zeros(log.n_items)
        self.changes: list[tuple[int, int, float]] = []
        self.regressed: list[tuple[int, int, float]] = []
        self.factors_u = np.array([first_factors(2 * u + 1) for u in range(log.n_users)])
        self.factors_i = np.array([first_factors(2 * i) for i in range(log.n_items)])

    def rate(self, of: str, number: int) -> float:
        labels = [x for (u, i), x in self.label.items() if (u if of == "user" else i) == number]
        return (sum(labels) + 5 * PRIOR) / (len(labels) + 5)

    def second(self, events: list[tuple[int, int, int, int]]) -> None:
        expected = dict(self.expected)
        for u, i, _, _ in events:
            if (u, i) not in self.expected:
                z = logit(self.rate("user", u)) + logit(self.rate("item", i)) - logit(PRIOR)
                expected[u, i] = 1 / (1 + np.exp(-z))
        for u, i, time, feedback in events:
            first = (u, i) not in self.residual
            r = 0.0 if feedback == WITHDRAWN else (feedback == DISLIKE) - expected[u, i]
            change = r - self.residual.get((u, i), 0.0)
            self.weight_i[i] += abs(change) * np.linalg.norm(self.sketch_u[u])
            self.weight_u[u] += abs(change) * np.linalg.norm(self.sketch_i[i])
            self.opinion[i] += change * self.sketch_u[u]
            self.taste[u] += change * self.sketch_i[i]
            self.sketch_u[u] += change * signs(2 * i)
            self.sketch_i[i] += change * signs(2 * u + 1)
            self.changes.append((u, i, change))
            if first and feedback != WITHDRAWN:
                self.regressed.append((u, i, r))
                p, q = self.factors_u[u].copy(), self.factors_i[i].copy()
                step = 0.4 * (r - p @ q) / (1 + 0.4 * (p @ p + q @ q))
                self.factors_u[u] += step * q - 0.4 * 0.003 * p
                self.factors_i[i] += step * p - 0.4 * 0.003 * q
            self.expected[u, i], self.residual[u, i] = expected[u, i], r
            self.label.pop((u, i), None)
            if feedback != WITHDRAWN:
                self.label[u, i] = int(feedback == DISLIKE)
            self.events.append((u, i, time, feedback))

    def answer(self, u: int, i: int, moment: int) -> list[float]:
        out: list[float] = []
        for a, b, weight in (
            (self.sketch_u[u], self.opinion[i], self.weight_i[i]),
            (self.sketch_i[i], self.taste[u], self.weight_u[u]),
        ):
            length = np.linalg.norm(a)
            out += [a @ b, a @ b / (length * np.linalg.norm(b) + 1e-3), a @ b / (length * weight + 0.5)]
        out.append(float(self.factors_u[u] @ self.factors_i[i]))
        mine = [(j, change) for v, j, change in self.changes if v == u][-RECENT:]
        kernel = [max(self.text[i] @ self.text[j], 0) ** 3 for j, _ in mine]
        out += [sum(k * change for k, (_, change) in zip(kernel, mine, strict=True)) / (sum(kernel) + 0.3), sum(kernel)]
        rows = [(j, r) for v, j, r in self.regressed if v == u]
        x, y = self.text[[j for j, _ in rows]][:, :RIDGE], np.array([r for _, r in rows])
        out.append(float(np.linalg.solve(x.T @ x + 2 * np.eye(RIDGE), x.T @ y) @ self.text[i, :RIDGE]))
        for level in (1, 2):
            labels = [x for (_, j), x in self.label.items() if (self.codes[j, :level] == self.codes[i, :level]).all()]
            out.append(sum(x - PRIOR for x in labels) / (len(labels) + 3))
        for number in (lambda e: e[0] == u, lambda e: e[1] == i, lambda e: True):
            mean, share = PRIOR, 0.005 if number((-1, -1)) else 0.15
            for event in self.events:
                if number(event) and event[3] != WITHDRAWN:
                    mean += share * ((event[3] == DISLIKE) - mean)
            out.append(mean)
        judged = [e for e in self.events if e[3] != WITHDRAWN]
        last = max((e[2] for e in judged if e[0] == u), default=None)
        disliked = max((e[2] for e in judged if e[0] == u and e[3] == DISLIKE), default=None)
        first = min((e[2] for e in judged if e[1] == i), default=None)
        return out + [np.nan if since is None else (moment - since) / DAY for since in (last, disliked, first)]


@pytest.mark.parametrize(("seed", "context"), [(0, "event"), (1, "event"), (2, "day")])
def test_evidence_is_that_of_a_loop_over_the_events(seed: int, context: str) -> None:
    log, items = random_log(seed), random_items(seed)
    rng = np.random.default_rng(seed)
    moments = log.moments(context)
    own = rng.permutation(np.flatnonzero(log.judged))[:40]
    user = np.concatenate([log.user[own], rng.integers(0, USERS, 60)])
    item = np.concatenate([log.item[own], rng.integers(0, ITEMS, 60)])
    moment = np.concatenate([moments[own], rng.integers(-5, int(log.time.max()) + DAY, 60) // 350 * 350])
    got = Evidence(log, items, PRIOR, context).columns(user, item, moment)
    rows = [row for row in np.argsort(moments, kind="stable") if log.feedback[row] != EXPOSED]
    events = [(int(log.user[r]), int(log.item[r]), int(moments[r]), int(log.feedback[r])) for r in rows]
    reading, done = Reading(log, items), 0
    for q in np.argsort(moment, kind="stable"):
        while done < len(events) and events[done][2] < moment[q]:
            end = next((k for k in range(done, len(events)) if events[k][2] != events[done][2]), len(events))
            reading.second(events[done:end])
            done = end
        expected = np.array(reading.answer(int(user[q]), int(item[q]), int(moment[q])))
        np.testing.assert_allclose(got[q], expected, rtol=2e-4, atol=2e-5)
    assert done > 0.8 * len(events) and np.abs(got[:, [0, 3, 6, 7, 9]]).max(0).min() > 0.01


def test_nothing_of_the_second_itself_or_later_counts_and_how_it_is_asked_does_not_matter() -> None:
    log, items = random_log(3), random_items(3)
    moment = int(np.sort(log.time)[EVENTS // 2])
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(USERS), np.arange(ITEMS)))
    asked = user, item, np.full(len(user), moment)
    before = Evidence(log, items, PRIOR, "event").columns(*asked)
    late = log.time >= moment
    swapped = np.where(log.feedback == LIKE, DISLIKE, np.where(log.feedback == DISLIKE, LIKE, log.feedback))
    changed = replace(log, feedback=np.where(late, swapped, log.feedback).astype(np.uint8))
    after = Evidence(changed, items, PRIOR, "event")
    assert np.array_equal(before, after.columns(*asked), equal_nan=True)
    assert not np.array_equal(before, after.columns(user, item, asked[2] + 1), equal_nan=True)
    for rows in np.array_split(np.random.default_rng(0).permutation(len(user)), 3):
        part = after.columns(*(column[rows] for column in asked))
        assert np.array_equal(part, before[rows], equal_nan=True)


def test_users_and_items_that_come_later_change_nothing() -> None:
    log, items = random_log(4), random_items(4)
    assert items.vectors is not None and items.codes is not None
    more = replace(
        log, user_offsets=np.append(log.user_offsets, len(log) + 2), n_items=ITEMS + 1,
        item=np.append(log.item, [ITEMS, 0]).astype(np.int32), feedback=np.append(log.feedback, [LIKE, LIKE]),
        time=np.append(log.time, log.time.max() + np.array([1, 2])),
    )  # fmt: skip
    table = replace(
        items, ids=[*items.ids, "new"], text=[*items.text, ""], original=ITEMS,
        vectors=np.append(items.vectors, items.vectors[:1] + 1, axis=0),
        codes=np.append(items.codes, [[9, 9, 9]], axis=0),
    )  # fmt: skip
    asked = np.arange(USERS), np.arange(USERS), np.full(USERS, log.time.max())
    before, after = (Evidence(*of, PRIOR, "event").columns(*asked) for of in ((log, items), (more, table)))
    assert np.array_equal(before, after, equal_nan=True)


def test_sketches_estimate_exact_neighbourhoods() -> None:
    """<s_u, t_i> is the sum over others v and items j, judged by v before i, of r_vi r_vj r_uj, with a relative error
    of about 1 / sqrt(SKETCH)."""
    rng = np.random.default_rng(5)
    users, items = 60, 40
    taste, kind = rng.normal(size=(users, 2)), rng.normal(size=(items, 2))
    pairs = rng.permutation(users * items)[:1200]
    log = EventLog(
        np.concatenate([[0], np.cumsum(np.bincount(pairs // items, minlength=users))]),
        (np.sort(pairs) % items).astype(np.int32), np.zeros(1200, np.uint8), rng.permutation(1200), None, items,
    )  # fmt: skip
    likes = (taste[log.user] * kind[log.item]).sum(1) > 0
    order = np.concatenate(
        [np.sort(log.time[a:b]) for a, b in zip(log.user_offsets, log.user_offsets[1:], strict=False)]
    )
    log = replace(log, feedback=np.where(likes, LIKE, DISLIKE).astype(np.uint8), time=order)
    table = ItemTable([""] * items, [""] * items)
    evidence = Evidence(log, table, 0.5, "event")
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(users), np.arange(items)))
    got = evidence.columns(user, item, np.full(len(user), 1200))[:, 0]
    count, disliked = np.zeros((2, users)), np.zeros((2, items))
    r, first = np.zeros((users, items)), np.zeros((items, users, items))  # first[i, v, j]: r_vj known when v judged i
    for row in np.argsort(log.time):
        u, i, label = log.user[row], log.item[row], log.feedback[row] == DISLIKE
        p, q = ((c[1, k] + 2.5) / (c[0, k] + 5) for c, k in ((count, u), (disliked, i)))
        first[i, u] = r[u]
        r[u, i] = label - 1 / (1 + np.exp(-logit(p) - logit(q)))
        count[:, u] += 1, label
        disliked[:, i] += 1, label
    exact = np.array([(r[:, i] * (first[i] @ r[u])).sum() for u, i in zip(user, item, strict=True)])
    assert np.sqrt(((got - exact) ** 2).mean() / (exact**2).mean()) < 3 / np.sqrt(SKETCH)
    assert np.corrcoef(got, exact)[0, 1] > 0.97
