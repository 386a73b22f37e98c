"""Features against the reference in numpy and float64, and live answers against those of a whole log."""

from dataclasses import replace
from itertools import groupby
from operator import itemgetter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.features import Features, key_of
from negfast.data import features as module
from negfast.data.features import HistoryFeatures
from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, WITHDRAWN, EventLog
from negfast.data.split import sample_pairs

USERS, ITEMS, EVENTS, PRIOR, PRIOR_VALUE = 12, 15, 500, 0.3, 5.0
TEXT = 32
CONSTANTS = {
    "pseudo_events": 5,
    "recent_pseudo_events": 3,
    "cell_pseudo_events": 3,
    "half_life": 30 * DAY,
    "count_half_life": 2 * DAY,
    "judgements": 128,
    "judges": 256,
    "recent": 32,
    "ridge": 8,
    "alike_weight": 0.5,
    "alike_length": 0.5,
    "text_weight": 0.3,
    "penalty": 2,
    "step": 0.4,
    "shrink": 0.003,
    "start": 0.2,
    "lately": 0.15,
    "lately_all": 0.005,
}


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


def reading(of_log: HistoryFeatures) -> Features:
    """The reference before the first event, in float64; it takes the columns' names and the shapes of the state from
    the engine."""
    items = of_log.items
    assert items.codes is not None
    cells: dict[bytes, int] = {}
    groups = [[cells.setdefault(code[:level].tobytes(), len(cells)) for level in (1, 2)] for code in items.codes]
    kinds = [name.removeprefix("genres=") for name in of_log.names if name.startswith("genres=")]
    years = [name for of_item in items.attributes["year"] for name in of_item]
    values = {value: number for number, value in enumerate([*kinds, *years])}
    lists = [[values[v] for v in of_item] for both in zip(*items.attributes.values(), strict=True) for of_item in both]
    tables: dict[str, np.ndarray] = {
        name: np.zeros(table.shape, float if table.dtype.kind == "f" else table.dtype)
        for name, table in of_log._start().state.tables().items()
        if name.startswith(("user.", "item."))
    }
    tables |= {
        "item.text": text_vectors(items),
        "item.cell": np.array(groups),
        "cell.count": np.zeros(len(cells)),
        "cell.excess": np.zeros(len(cells)),
        "value.count": np.zeros(len(values)),
        "value.dislikes": np.zeros(len(values)),
        "value.column": np.array([*range(len(kinds)), *(0 for _ in years)]),
        "value.content": np.array([*(1.0 for _ in kinds), *map(float, years)]),
        "values_of.start": np.cumsum([0, *map(len, lists)]),
        "values_of.value": np.array([value for of_item in lists for value in of_item]),
        "lately": np.array([PRIOR]),
        "learned": np.array([-1]),
    }
    for name, rows in (("judgements", len(of_log.user_keys)), ("judges", len(items))):
        tables |= {
            f"{name}.start": np.zeros(rows + 1, int),
            f"{name}.other": np.zeros(0),
            f"{name}.residual": np.zeros(0),
        }
    spec = {
        "names": of_log.names,
        "prior_rate": PRIOR,
        "prior_value": PRIOR_VALUE,
        "constants": CONSTANTS,
        "attributes": [
            {"name": "genres", "columns": len(kinds), "missing": 0.0},
            {"name": "year", "columns": 1, "missing": None},
        ],
    }
    item_keys = [key_of(name) for name in items.ids]
    users = range(len(of_log.user_keys))
    out = Features(spec, tables, users, item_keys)
    seeds = (out.user, [2 * user + 1 for user in users]), (out.item, [2 * key for key in item_keys])
    for table, of_row in seeds:
        without = {name: column for name, column in table.items() if name not in ("text", "cell")}
        for row, seed in enumerate(of_row):
            for name, value in out.unknown(without, seed).items():
                table[name][row] = value
    return out


def reread(log: EventLog, known: Features, context: str, before: int) -> list[tuple[int, list]]:
    """The reference learns the likes, dislikes and withdrawals of moments before ``before``, which are returned."""
    assert log.value is not None
    moments = log.moments(context)
    rows = [row for row in np.argsort(moments, kind="stable") if log.feedback[row] != EXPOSED and moments[row] < before]
    columns = (column[rows].tolist() for column in (log.user, log.item, log.feedback, log.value))
    events = zip(moments[rows].tolist(), *columns, strict=True)
    of_moments = [(moment, [event[1:] for event in some]) for moment, some in groupby(events, itemgetter(0))]
    for moment, some in of_moments:
        if moment > known.learned:
            known.learn(moment, some)
    return of_moments


def features(log: EventLog, items: ItemTable, context: str = "event") -> HistoryFeatures:
    return HistoryFeatures(log, items, PRIOR, PRIOR_VALUE, context)


@pytest.mark.parametrize(
    ("seed", "context", "users", "n_items", "events"),
    [
        (0, "event", USERS, ITEMS, EVENTS),
        (1, "event", USERS, ITEMS, EVENTS),
        (2, "day", USERS, ITEMS, EVENTS),
        (3, "event", 3, ITEMS, 700),  # more judgements of a user than are kept
        (4, "day", USERS, 3, 1000),  # more judgements of an item than are kept
    ],
)
def test_columns_are_those_of_a_loop_over_the_events(
    seed: int, context: str, users: int, n_items: int, events: int
) -> None:
    log, items = random_log(seed, users, n_items, events), random_items(seed, n_items)
    rng = np.random.default_rng(seed)
    moments = log.moments(context)
    own = rng.permutation(np.flatnonzero(log.judged))[:40]
    user = np.concatenate([log.user[own], rng.integers(0, users, 60)])
    item = np.concatenate([log.item[own], rng.integers(0, n_items, 60)])
    moment = np.concatenate([moments[own], rng.integers(-5, int(log.time.max()) + DAY, 60) // 350 * 350])
    of_log = features(log, items, context)
    got = of_log.rich(user, item, moment)
    assert got.shape == (100, of_log.width) and len(set(of_log.names)) == of_log.width
    known = reading(of_log)
    for q in np.argsort(moment, kind="stable"):
        done = reread(log, known, context, int(moment[q]))
        expected = known.columns(int(user[q]), item[q : q + 1], int(moment[q]))
        np.testing.assert_allclose(got[q], expected[0], rtol=2e-4, atol=2e-5)
    assert len(done) > 0.8 * len(np.unique(moments)) and np.nanmax(np.abs(got), axis=0).min() > 0.01


def test_the_reference_keeps_what_its_judgements_define() -> None:
    """Running sums are the sums over all pairs' last feedback and over all changes, and moments that come late leave
    the same."""
    log, items = random_log(8), random_items(8)
    changes: list[tuple[int, int, int, dict]] = []

    class Recorded(Features):
        def _learn(self, user: int, item: int, feedback: int, moment: int, change: dict) -> None:
            changes.append((user, item, moment, change))
            super()._learn(user, item, feedback, moment, change)

    known = reading(features(log, items))
    known.__class__ = Recorded
    reread(log, known, "event", int(log.time.max()) + 1)
    said = {(u, i): said for u, of_user in known.said.items() for i, said in of_user.items() if said[0] != WITHDRAWN}
    for table, side, expected in ((known.user, 0, "of_item"), (known.item, 1, "of_user")):
        for row in range(len(table["factors"])):
            labels = [feedback == DISLIKE for pair, (feedback, _) in said.items() if pair[side] == row]
            values = [value for pair, (_, value) in said.items() if pair[side] == row and np.isfinite(value)]
            assert (table["sums.count"][row], table["sums.dislikes"][row]) == (len(labels), sum(labels))
            sums = len(values), sum(values), sum(value**2 for value in values)
            names = "sums.value_count", "sums.value", "sums.value_square"
            np.testing.assert_allclose([table[name][row] for name in names], sums, rtol=1e-9, atol=1e-9)
            mine = [(moment, change) for *pair, moment, change in changes if pair[side] == row]
            for kind, (name, of) in enumerate((("sums.dislike", "dislike"), ("sums.of_value", "value"))):
                excess = [change[of][1] - change[of][0] * change[expected][kind] for _, change in mine]
                left = [0.5 ** ((table["sums.at"][row] - moment) / CONSTANTS["half_life"]) for moment, _ in mine]
                assert table[f"{name}.excess"][row] == pytest.approx(sum(excess), abs=1e-9)
                assert table[f"{name}.recent_excess"][row] == pytest.approx(np.dot(excess, left), abs=1e-9)
    for level, code in enumerate(known.item["cell"].T):
        for cell in np.unique(code):
            labels = [feedback == DISLIKE for (_, i), (feedback, _) in said.items() if code[i] == cell]
            assert known.cell["count"][cell] == len(labels), level
            assert known.cell["excess"][cell] == pytest.approx(sum(labels) - PRIOR * len(labels))
    late = reading(features(log, items))
    for _, item, moment, change in sorted(changes, key=lambda change: -change[2]):
        late._count(late.item, item, moment, change, change["of_user"])
    for name in ("recent_events", "dislike.recent_count", "of_value.recent_excess"):
        np.testing.assert_allclose(late.item[f"sums.{name}"], known.item[f"sums.{name}"], rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("context", ["day", "event"])
def test_answers_do_not_depend_on_how_many_events_are_replayed_at_once_nor_on_what_is_kept(monkeypatch, context):
    log, items = random_log(3), random_items(3)
    of_log = features(log, items, context)
    asked = (*np.divmod(of_log.first_pairs, ITEMS), of_log.first_moments)
    later = (*asked[:2], asked[2] + 3 * DAY)
    expected = [of_log.rich(*asked), of_log.rich(*later)]
    monkeypatch.setattr(module, "REPLAYED_AT_ONCE", 7)
    monkeypatch.setattr(module, "ANSWERED_ONCE", 20)
    other = features(log, items, context)
    for rows, whole in zip((asked, later, later, asked), (*expected, expected[1], expected[0]), strict=True):
        assert np.array_equal(other.rich(*rows), whole, equal_nan=True)
    assert len(other._of_first) == 20 < len(asked[0])


def test_what_is_drawn_is_replayed_once(monkeypatch):
    log, items = random_log(3), random_items(3)
    pairs = features(log, items).first_pairs
    monkeypatch.setattr(module, "ANSWERED_ONCE", 20)
    of_log = features(log, items)
    drawn = pairs[sample_pairs(*np.divmod(pairs, log.n_items), 10)]  # fewer of the same draw
    user, item = (part.astype(np.int32) for part in np.divmod(drawn, log.n_items))
    at = np.searchsorted(of_log.first_pairs, drawn)
    replays, start = [], of_log._start

    def counted() -> object:
        replays.append(1)
        return start()

    monkeypatch.setattr(of_log, "_start", counted)
    first = of_log.rich(user, item, of_log.first_moments[at])
    again = of_log.rich(user, item, of_log.first_moments[at])
    assert len(replays) == 1 and np.array_equal(first, again, equal_nan=True)
    of_log.rich(user, item, of_log.first_moments[at] + DAY)
    assert len(replays) == 2


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


def test_neighbourhoods_are_exact() -> None:
    """As matrices, where nothing is older than what is kept: r of an item's judges, weighed by the cosine of their
    residuals and the user's."""
    rng = np.random.default_rng(5)
    users, items = 60, 40
    taste, kind = rng.normal(size=(users, 2)), rng.normal(size=(items, 2))
    pairs = np.sort(rng.permutation(users * items)[:1200])
    log = EventLog(
        np.concatenate([[0], np.cumsum(np.bincount(pairs // items, minlength=users))]),
        (pairs % items).astype(np.int32), np.zeros(1200, np.uint8), rng.permutation(1200), None, items,
    )  # fmt: skip
    likes = (taste[log.user] * kind[log.item]).sum(1) > 0
    order = np.concatenate(
        [np.sort(log.time[a:b]) for a, b in zip(log.user_offsets, log.user_offsets[1:], strict=False)]
    )
    log = replace(log, feedback=np.where(likes, LIKE, DISLIKE).astype(np.uint8), time=order)
    table = ItemTable([str(i) for i in range(items)], [""] * items)
    of_log = HistoryFeatures(log, table, 0.5, 0.0, "event")
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(users), np.arange(items), indexing="ij"))
    rich = of_log.rich(user, item, np.full(len(user), 1200))
    got = [rich[:, of_log.names.index(f"like_users_{name}")].reshape(users, items) for name in ("sum", "mean")]
    count, disliked, r = np.zeros((2, users)), np.zeros((2, items)), np.zeros((users, items))
    for row in np.argsort(log.time):
        u, i, label = log.user[row], log.item[row], log.feedback[row] == DISLIKE
        p, q = ((c[1, k] + 2.5) / (c[0, k] + 5) for c, k in ((count, u), (disliked, i)))
        r[u, i] = label - 1 / (1 + np.exp(-logit(p) - logit(q)))
        count[:, u] += 1, label
        disliked[:, i] += 1, label
    length = np.linalg.norm(r, axis=1)
    cosine = r @ r.T / (np.outer(length, length) + 0.5)
    np.fill_diagonal(cosine, 0)
    expected = cosine @ r
    np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], expected / (np.abs(cosine) @ (r != 0) + 0.5), rtol=1e-4, atol=1e-5)
