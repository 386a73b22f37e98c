"""Features against a plain reading of their definitions in float64, and live answers against those of a whole log."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.data.features import HistoryFeatures, keys_of
from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, WITHDRAWN, EventLog

USERS, ITEMS, EVENTS, PRIOR, PRIOR_VALUE = 12, 15, 500, 0.3, 5.0
SKETCH, TEXT, RIDGE, RECENT = 128, 32, 8, 32
HALF_LIFE, COUNT_HALF_LIFE = 30 * DAY, 2 * DAY


def random_log(seed: int, users: int = USERS, items: int = ITEMS, events: int = EVENTS) -> EventLog:
    """Many events of one second, changed feedback, withdrawals and exposures."""
    rng = np.random.default_rng(seed)
    user, time = np.sort(rng.integers(0, users, events)), rng.integers(0, events // 3, events) * 700
    time = time[np.lexsort((time, user))]
    feedback = rng.choice([EXPOSED, LIKE, DISLIKE, WITHDRAWN], events, p=[0.1, 0.5, 0.3, 0.1]).astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))])
    value = np.where(rng.random(events) < 0.2, np.nan, rng.normal(5, 2, events)).astype(np.float32)
    return EventLog(offsets, rng.integers(0, items, events).astype(np.int32), feedback, time, value, items)


def random_items(seed: int, items: int = ITEMS) -> ItemTable:
    rng = np.random.default_rng(seed)
    vectors, codes = rng.normal(size=(items, 40)).astype(np.float32), rng.integers(0, 3, (items, 3)).astype(np.uint16)
    vectors[1] = 0  # an item without text
    genres: list[tuple[str, ...]] = [
        tuple(np.array(["x", "y", "z"])[rng.random(3) < 0.4].tolist()) for _ in range(items)
    ]
    years: list[tuple[str, ...]] = [(str(1990 + i),) if i % 4 else () for i in range(items)]
    ids = [str(i) for i in range(items)]
    return ItemTable(ids, [""] * items, {"genres": genres, "year": years}, vectors=vectors, codes=codes)


def mixed(x: int) -> int:
    """SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def signs(key: int) -> np.ndarray:
    """The random signs of 2 * the item's key, or of 2 * the user's + 1."""
    seed, out = mixed(key % 2**64), []
    for part in range(SKETCH // 16):
        bits = mixed((seed + part) % 2**64) >> 32
        out += [-1.0 if bits >> lane & 1 else 1.0 for lane in range(16)]
    return np.array(out) / np.sqrt(SKETCH)


def first_factors(key: int) -> np.ndarray:
    seed = mixed(key % 2**64)
    mixes = [mixed(2**64 - 1 - (seed + lane) % 2**64) for lane in range(16)]
    return np.array([0.2 * ((x >> 40) / 2**24 - 0.5) for x in mixes])


def text_vectors(items: ItemTable) -> np.ndarray:
    assert items.vectors is not None
    centred = items.vectors[: items.original].astype(float)
    mean = centred.mean(0)
    axes = np.linalg.svd(centred - mean)[2][:TEXT]
    along = (items.vectors - mean) @ axes.T
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    return np.where(items.vectors.any(1, keepdims=True), along, 0)


def smoothed(found: list[float], prior: float) -> float:
    return (sum(found) + 5 * prior) / (len(found) + 5)


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


class Reading:
    """What is known after some events, in float64 and as it is defined, with no thought of speed."""

    def __init__(self, log: EventLog, items: ItemTable) -> None:
        assert items.codes is not None
        self.items, self.text, self.codes = items, text_vectors(items), items.codes
        self.user_key, self.item_key = list(range(log.n_users)), [int(key) for key in keys_of(items.ids)]
        self.events: list[tuple[int, int, int, int, float]] = []  # user, item, moment, feedback, value
        self.said: dict[tuple[int, int], tuple[int, float]] = {}  # last feedback and value of a pair
        self.sketch_u, self.taste = np.zeros((2, log.n_users, SKETCH))
        self.sketch_i, self.opinion = np.zeros((2, log.n_items, SKETCH))
        self.weight_u, self.weight_i = np.zeros(log.n_users), np.zeros(log.n_items)
        self.changes: list[tuple[int, int, float]] = []
        self.regressed: list[tuple[int, int, float]] = []
        self.factors_u = np.array([first_factors(2 * key + 1) for key in self.user_key])
        self.factors_i = np.array([first_factors(2 * key) for key in self.item_key])
        # (user, item, moment, change of count, excess of the user, excess of the item) of dislikes and of values
        self.excess: tuple[list[tuple[int, int, int, float, float, float]], ...] = ([], [])

    def labels(self, chosen: Callable[[int, int], bool]) -> list[float]:
        return [float(f == DISLIKE) for (u, i), (f, _) in self.said.items() if chosen(u, i) and f != WITHDRAWN]

    def values(self, chosen: Callable[[int, int], bool]) -> list[float]:
        return [v for (u, i), (f, v) in self.said.items() if chosen(u, i) and f != WITHDRAWN and np.isfinite(v)]

    def deviation(self, kind: int, side: int, number: int) -> float:
        count = sum(e[3] for e in self.excess[kind] if e[side] == number)
        return sum(e[4 + side] for e in self.excess[kind] if e[side] == number) / (count + 5)

    def recent(self, kind: int, side: int, number: int, moment: int) -> float:
        mine = [
            (e[3], e[4 + side], 0.5 ** ((moment - e[2]) / HALF_LIFE)) for e in self.excess[kind] if e[side] == number
        ]
        return sum(x * w for _, x, w in mine) / (max(sum(n * w for n, _, w in mine), 0.0) + 3)

    def moment(self, events: list[tuple[int, int, int, int, float]]) -> None:
        learned, said = [], dict(self.said)
        for u, i, _, feedback, value in events:
            f, v = said.get((u, i), (WITHDRAWN, np.nan))
            is_first = (u, i) not in said and feedback != WITHDRAWN
            value = np.nan if feedback == WITHDRAWN else value
            said[u, i] = feedback, value
            judged = (feedback != WITHDRAWN) - (f != WITHDRAWN)
            disliked = (feedback == DISLIKE) - (f == DISLIKE)
            valued = float(np.isfinite(value)) - float(np.isfinite(v))
            total = float(np.nan_to_num(value) - np.nan_to_num(v))
            of_user, of_item = self.labels(lambda a, b: a == u), self.labels(lambda a, b: b == i)  # noqa: B023
            z = logit(smoothed(of_user, PRIOR)) + logit(smoothed(of_item, PRIOR)) - logit(PRIOR)
            r = disliked - judged / (1 + np.exp(-z))
            means = smoothed(of_item, PRIOR), smoothed(self.values(lambda a, b: b == i), PRIOR_VALUE)  # noqa: B023
            users = PRIOR + self.deviation(0, 0, u), PRIOR_VALUE + self.deviation(1, 0, u)
            learned.append((judged, disliked, valued, total, is_first, r, means, users))
        for (u, i, moment, feedback, value), change in zip(events, learned, strict=True):
            judged, disliked, valued, total, is_first, r, means, users = change
            for kind, (count, amount) in enumerate(((judged, disliked), (valued, total))):
                excess = amount - count * means[kind], amount - count * users[kind]
                self.excess[kind].append((u, i, moment, float(count), *excess))
            self.weight_i[i] += abs(r) * np.linalg.norm(self.sketch_u[u])
            self.weight_u[u] += abs(r) * np.linalg.norm(self.sketch_i[i])
            self.opinion[i] += r * self.sketch_u[u]
            self.taste[u] += r * self.sketch_i[i]
            self.sketch_u[u] += r * signs(2 * self.item_key[i])
            self.sketch_i[i] += r * signs(2 * self.user_key[u] + 1)
            self.changes.append((u, i, r))
            if is_first:
                self.regressed.append((u, i, r))
                p, q = self.factors_u[u].copy(), self.factors_i[i].copy()
                step = 0.4 * (r - p @ q) / (1 + 0.4 * (p @ p + q @ q))
                self.factors_u[u] += step * q - 0.4 * 0.003 * p
                self.factors_i[i] += step * p - 0.4 * 0.003 * q
            self.said[u, i] = feedback, np.nan if feedback == WITHDRAWN else value
            self.events.append((u, i, moment, feedback, value))

    def columns(self, u: int, i: int, moment: int) -> list[float]:
        of_user, of_item = self.labels(lambda a, b: a == u), self.labels(lambda a, b: b == i)
        values, item_values = self.values(lambda a, b: a == u), self.values(lambda a, b: b == i)
        out = [logit(smoothed(of_item, PRIOR)), logit(smoothed(of_user, PRIOR))]
        out += [np.log1p(len(of_item)), np.log1p(len(of_user))]
        out += [smoothed(item_values, PRIOR_VALUE), smoothed(values, PRIOR_VALUE)]
        out.append(float(np.std(values)) if len(values) > 1 else np.nan)
        for name, static in (("genres", None), ("year", [np.nan])):
            of_all = self.items.attributes[name]
            for whose in (lambda a: a == u, lambda a: True):
                rates = [
                    smoothed(self.labels(lambda a, b: whose(a) and value in of_all[b]), PRIOR)  # noqa: B023
                    for value in of_all[i]
                ]
                out.append(float(np.mean(rates)) if rates else np.nan)
            if static is None:
                names = sorted({"x", "y", "z"}, key=lambda x: (-sum(x in g for g in of_all), x))
                out += [float(genre in of_all[i]) for genre in names]
            else:
                out += [float(x) for x in of_all[i]] or static
        for kind in (0, 1):
            by_user, by_item = self.deviation(kind, 0, u), self.deviation(kind, 1, i)
            mine = [(n, abs(x) * n) for user, _, _, n, x, _ in self.excess[kind] if user == u]
            off = sum(x for _, x in mine) / (sum(n for n, _ in mine) + 1)
            lately = self.recent(kind, 0, u, moment), self.recent(kind, 1, i, moment)
            out += [by_user, by_item, by_user + by_item, *lately, off]
        decayed = sum(e[3] * 0.5 ** ((moment - e[2]) / COUNT_HALF_LIFE) for e in self.excess[0] if e[0] == u)
        out.append(np.log1p(max(decayed, 0.0)))
        spread = np.std(item_values) if len(item_values) > 1 else np.nan
        return [*out, *self.answer(u, i, moment), float(spread)]

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
            labels = self.labels(lambda _, j: (self.codes[j, :level] == self.codes[i, :level]).all())  # noqa: B023
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


def features(log: EventLog, items: ItemTable, context: str = "event") -> HistoryFeatures:
    return HistoryFeatures(log, items, PRIOR, PRIOR_VALUE, context)


@pytest.mark.parametrize(("seed", "context"), [(0, "event"), (1, "event"), (2, "day")])
def test_columns_are_those_of_a_loop_over_the_events(seed: int, context: str) -> None:
    log, items = random_log(seed), random_items(seed)
    rng = np.random.default_rng(seed)
    moments = log.moments(context)
    own = rng.permutation(np.flatnonzero(log.judged))[:40]
    user = np.concatenate([log.user[own], rng.integers(0, USERS, 60)])
    item = np.concatenate([log.item[own], rng.integers(0, ITEMS, 60)])
    moment = np.concatenate([moments[own], rng.integers(-5, int(log.time.max()) + DAY, 60) // 350 * 350])
    of_log = features(log, items, context)
    got = of_log.rich(user, item, moment)
    assert got.shape == (100, of_log.width) and len(set(of_log.names)) == of_log.width
    assert log.value is not None
    rows = [row for row in np.argsort(moments, kind="stable") if log.feedback[row] != EXPOSED]
    columns = (log.user[rows], log.item[rows], moments[rows], log.feedback[rows], log.value[rows])
    events = list(zip(*(column.tolist() for column in columns), strict=True))
    reading, done = Reading(log, items), 0
    for q in np.argsort(moment, kind="stable"):
        while done < len(events) and events[done][2] < moment[q]:
            end = next((k for k in range(done, len(events)) if events[k][2] != events[done][2]), len(events))
            reading.moment(events[done:end])
            done = end
        expected = np.array(reading.columns(int(user[q]), int(item[q]), int(moment[q])))
        np.testing.assert_allclose(got[q], expected, rtol=2e-4, atol=2e-5)
    assert done > 0.8 * len(events) and np.nanmax(np.abs(got), axis=0).min() > 0.01


def test_nothing_of_the_second_itself_or_later_counts_and_how_it_is_asked_does_not_matter() -> None:
    log, items = random_log(3), random_items(3)
    moment = int(np.sort(log.time)[EVENTS // 2])
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(USERS), np.arange(ITEMS)))
    asked = user, item, np.full(len(user), moment)
    before = features(log, items).rich(*asked)
    late = log.time >= moment
    swapped = np.where(log.feedback == LIKE, DISLIKE, np.where(log.feedback == DISLIKE, LIKE, log.feedback))
    assert log.value is not None
    changed = replace(
        log, feedback=np.where(late, swapped, log.feedback).astype(np.uint8), value=np.where(late, 9, log.value)
    )
    after = features(changed, items)
    assert np.array_equal(before, after.rich(*asked), equal_nan=True)
    assert not np.array_equal(before, after.rich(user, item, asked[2] + 1), equal_nan=True)
    for rows in np.array_split(np.random.default_rng(0).permutation(len(user)), 3):
        part = after.rich(*(column[rows] for column in asked))
        assert np.array_equal(part, before[rows], equal_nan=True)


@given(
    seed=st.integers(0, 2**16),
    context=st.sampled_from(["event", "day"]),
    share=st.floats(0, 1),
    asks=st.integers(0, 30),
)
@settings(max_examples=30, deadline=None)
def test_live_answers_are_those_of_the_whole_log(seed: int, context: str, share: float, asks: int) -> None:
    """Events after a moment are added one by one, of equal moments in any order, users and items as they come."""
    rng = np.random.default_rng(seed)
    log, items = random_log(seed, events=150), random_items(seed)
    names = [f"user {u}" for u in range(USERS)]
    start = int(np.quantile(log.time, share))
    known_items = ITEMS - 3
    log = log.without((log.time < start) & (log.item >= known_items))
    moments, late = log.moments(context), np.flatnonzero(log.time >= start)
    known_users = int(log.user[log.time < start].max(initial=-1)) + 1
    early = log.without(log.time >= start)
    assert items.vectors is not None and items.codes is not None
    table = replace(
        items.take(range(known_items)), vectors=items.vectors[:known_items], codes=items.codes[:known_items]
    )
    vectors, codes = items.vectors[known_items:], items.codes[known_items:]
    items = replace(items, original=known_items)
    few = replace(early, user_offsets=early.user_offsets[: known_users + 1], n_items=known_items)
    whole = HistoryFeatures(log, items, PRIOR, PRIOR_VALUE, context, names)
    live = HistoryFeatures(few, table, PRIOR, PRIOR_VALUE, context, names[:known_users]).live()
    new = rng.permutation(np.arange(known_users, USERS))  # in another order than the log's
    number = {int(u): u for u in range(known_users)} | {int(u): known_users + k for k, u in enumerate(new)}
    live.add_users([names[u] for u in new])
    rest = items.take(range(known_items, ITEMS))
    live.add_items(replace(rest, vectors=vectors, codes=codes))
    shuffled = rng.permutation(late)
    shuffled = shuffled[np.argsort(moments[shuffled], kind="stable")]
    for row in shuffled.copy():  # of one user in order of time, as they were made
        same = np.flatnonzero((log.user[shuffled] == log.user[row]) & (moments[shuffled] == moments[row]))
        shuffled[same] = np.sort(shuffled[same])
    assert log.value is not None
    assert log.value is not None
    for place, row in enumerate(shuffled.tolist()):
        if place % 5 == 0 and asks:
            asked, candidates = int(log.user[row]), rng.permutation(ITEMS).astype(np.int32)
            got = live.state.answer(number[asked], candidates, int(moments[row]))
            expected = whole.rich(np.full(ITEMS, asked), candidates, np.full(ITEMS, moments[row]))
            assert np.array_equal(got, expected, equal_nan=True)
        live.state.add(
            number[int(log.user[row])], int(log.item[row]), int(log.time[row]), int(log.feedback[row]), log.value[row]
        )
    end, every = int(log.time.max()) + DAY, np.arange(ITEMS, dtype=np.int32)
    for user in range(USERS):
        expected = whole.rich(np.full(ITEMS, user), every, np.full(ITEMS, end))
        assert np.array_equal(live.state.answer(number[user], every, end), expected, equal_nan=True)


def test_old_events_and_questions_are_refused() -> None:
    log, items = random_log(7), random_items(7)
    live = features(log, items).live()
    end = int(log.time.max())
    with pytest.raises(ValueError, match="older than what was learned"):
        live.state.add(0, 0, end - 1, LIKE)
    live.state.add(0, 0, end, LIKE)  # of the newest moment: it waits
    live.state.answer(0, np.arange(3, dtype=np.int32), end)
    before = live.state.answer(0, np.arange(3, dtype=np.int32), end + 1)
    with pytest.raises(ValueError, match="older than what was learned"):
        live.state.add(0, 0, end, LIKE)
    with pytest.raises(ValueError, match="are learned"):
        live.state.answer(0, np.arange(3, dtype=np.int32), end)
    for user, item, feedback in ((USERS, 0, LIKE), (0, ITEMS, LIKE), (-1, 0, LIKE), (0, 0, 4)):
        with pytest.raises(ValueError, match="expected"):
            live.state.add(user, item, end + 5, feedback)
    again = live.state.answer(0, np.arange(3, dtype=np.int32), end + 1)
    assert np.array_equal(before, again, equal_nan=True)


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
    table = ItemTable([str(i) for i in range(items)], [""] * items)
    of_log = HistoryFeatures(log, table, 0.5, 0.0, "event")
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(users), np.arange(items)))
    got = of_log.rich(user, item, np.full(len(user), 1200))[:, of_log.names.index("like_users_sum")]
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
