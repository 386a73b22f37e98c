"""A live run answers as a run over a data set of the same events does."""

import numpy as np
import pytest

import negfast
from negfast.data.log import DAY
from negfast.errors import InputError
from tests.tiny import prepare_log, run_cli, train_arguments, write_log

FIRST_DAYS = 60  # of 70 are what the run is trained on


@pytest.fixture(scope="module", params=["day", "event"])
def worlds(request, tmp_path_factory):
    """A run over the log's first days, the same over the whole log, and the rows of the days between them: (user, item,
    rating, time) in order of time, some of them changed and repeated feedback and of new users."""
    folder = tmp_path_factory.mktemp("live")
    events, items = write_log(folder)
    header, *lines = events.read_text().splitlines()
    rows = sorted((line.split(",") for line in lines), key=lambda row: int(row[3]))
    cut = 1_600_000_000 // DAY * DAY + FIRST_DAYS * DAY
    early, late = ([row for row in rows if (int(row[3]) < cut) == whether] for whether in (True, False))
    rng = np.random.default_rng(1)
    late += [[user, item, str(6 - int(rating)), str(int(time) + 50)] for user, item, rating, time in late[::5]]
    late += [[f"new{rng.integers(3)}", item, rating, time] for _, item, rating, time in late[::7]]
    late.sort(key=lambda row: int(row[3]))
    files = []
    for name, part in (("early", early), ("late", late)):
        files.append(folder / f"{name}.csv")
        files[-1].write_text("\n".join([header, *map(",".join, part)]) + "\n")
    base = prepare_log(folder, files[0], items)
    whole = folder / "whole"
    run_cli("prepare", str(files[1]), "--like", str(base), "--out", str(whole))
    run = folder / "run"
    run_cli(*train_arguments(base, run, history__context=request.param, history__window=16))
    return negfast.load(run), negfast.load(run, whole), [(u, i, int(r), int(t)) for u, i, r, t in late]


def add(live, row):
    user, item, rating, time = row
    live.add(user, item, time, "dislike" if rating <= 2 else "like", float(rating))


def test_live_equals_a_data_set_of_the_same_events(worlds):
    run, whole, rows = worlds
    live = run.live()
    for row in rows:
        add(live, row)
    end = (whole._engine.log.time.max() // DAY + 1) * DAY
    users = [*whole._engine.data.user_ids[::9], *whole._engine.data.user_ids[-3:], "nobody"]
    items = [*whole._engine.data.items.ids[::4], "nothing"]
    pairs = [(user, item) for user in users for item in items]
    at = np.datetime64(int(end), "s")
    found, expected = (one.score(*zip(*pairs, strict=True), at=at) for one in (live, whole))
    assert np.array_equal(found.abstain, expected.abstain)
    assert np.array_equal(found.probability, expected.probability, equal_nan=True)
    assert np.std(expected.probability[~expected.abstain]) > 1e-3


def test_features_are_the_same_to_the_bit(worlds):
    run, whole, rows = worlds
    live = run.live()
    for row in rows:
        add(live, row)
    log, engine = whole._engine.log, whole._engine
    moment = int((log.time.max() // DAY + 1) * DAY)
    items = np.arange(log.n_items, dtype=np.int32)
    for user_id in engine.data.user_ids[::11]:
        user = whole._index["user"][user_id]
        expected = engine.features.rich(np.full(len(items), user), items, np.full(len(items), moment))
        found = live.features.state.answer(live.users[user_id], items, moment)
        assert np.array_equal(found, expected.astype(np.float32), equal_nan=True)


def test_events_of_a_moment_may_come_in_any_order(worlds):
    """In context "day" those of a day: two of a user count in the order of their times."""
    run, _, rows = worlds
    user, items = rows[0][0], run._engine.data.items.ids[:9]
    first = rows[-1][3] // DAY * DAY + DAY
    apart = 3600 if run._engine.config.history.context == "day" else 0
    told = [(items[n], first + n * apart, feedback) for n, feedback in enumerate(("like", "dislike", "like"))]
    found = []
    for order in ([0, 1, 2], [2, 0, 1] if apart else [0, 1, 2]):
        live = run.live()
        for n in order:
            live.add(user, *told[n])
        found.append(live.score(user, items, at=np.datetime64(first + DAY, "s")).probability)
    assert np.array_equal(*found)


def test_users_and_items_become_known(worlds):
    run, _, rows = worlds
    live, time = run.live(), rows[-1][3]
    at = np.datetime64(time + DAY, "s")
    item = "a new one"
    live.add("somebody", item, time, "dislike", 1.0, text="The grim story 12")
    scores = live.score("somebody", [item, run._engine.data.items.ids[0], "nothing"], at=at)
    assert scores.abstain.tolist() == [False, False, True]
    assert not live.score("u1", [item], at=at).abstain[0]
    known = run._engine.data.codes
    assert not (known == live.codes[-1]).all(1).any()  # no other item's


def test_an_answer_does_not_see_what_comes_after(worlds):
    run, _, rows = worlds
    live, time = run.live(), rows[0][3]
    user, item = rows[0][0], rows[0][1]
    at = np.datetime64(time, "s")
    before = live.score(user, [item], at=at).probability
    add(live, rows[0])
    assert live.score(user, [item], at=at).probability == before
    later = np.datetime64(time + DAY, "s")
    assert live.score(user, [item], at=later).probability != before


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (("u1", "i1", 1, "dislike"), "time: found 1, expected"),
        (("u1", "i1", None, "hate"), "feedback: found 'hate', expected shown, like, dislike, withdrawn"),
        (("u1", "unheard", None, "like"), "item 'unheard': is new, expected its text beside it"),
    ],
)
def test_bad_events_change_nothing(worlds, event, message):
    run, _, rows = worlds
    live = run.live()
    user, item, time, feedback = event
    with pytest.raises(InputError, match=message):
        live.add(user, item, rows[0][3] if time is None else time, feedback)
    at = np.datetime64(rows[0][3], "s")
    expected = run.live().score("u1", ["i1", "i2"], at=at).probability
    assert np.array_equal(live.score("u1", ["i1", "i2"], at=at).probability, expected)
    with pytest.raises(InputError, match="moments go forward"):
        live.score("u1", ["i1"], at="2001-01-01")


def test_new_items_are_those_that_a_data_set_gets(worlds, tmp_path):
    """Told by their texts one at a time, as `prepare --like` reads them from a table: to the bit."""
    run, _, rows = worlds
    time, users = rows[-1][3] // DAY * DAY + DAY, ["u3", "u8", "u21"]
    texts = {"fresh1": "The grim story 400", "fresh2": "A quiet tale", "fresh3": "Sweet and wild"}
    events = [(user, item, (1, 5)[n % 2], time + 600 * n) for n, item in enumerate(texts) for user in users]
    table = "\n".join(["user,item,rating,time", *(",".join(map(str, row)) for row in [*rows, *events])])
    (tmp_path / "late.csv").write_text(table + "\n")
    (tmp_path / "items.csv").write_text(
        "\n".join(["item,title,genre", *(f"{i},{t}," for i, t in texts.items())]) + "\n"
    )
    data, out = run._folder.data, tmp_path / "whole"
    files = (str(tmp_path / "late.csv"), "--items", str(tmp_path / "items.csv"))
    run_cli("prepare", *files, "--like", str(data), "--out", str(out))
    whole, live = negfast.load(run.path, out), run.live()
    for row in rows:
        add(live, row)
    for user, item, rating, second in events:
        live.add(user, item, second, "dislike" if rating <= 2 else "like", float(rating), text=texts[item])
    end, items = time + DAY, [*texts, *run._engine.data.items.ids[::5]]
    for user in [*users, "u30", "new1"]:
        found = live.features.state.answer(live.users[user], np.array([live.items[i] for i in items], np.int32), end)
        index = np.array([whole._index["item"][item] for item in items])
        asked = np.full(len(items), whole._index["user"][user]), index, np.full(len(items), end)
        assert np.array_equal(found, whole._engine.features.rich(*asked).astype(np.float32), equal_nan=True)
        scores = [one.score([user] * len(items), items, at=np.datetime64(end, "s")) for one in (live, whole)]
        assert np.array_equal(scores[0].probability, scores[1].probability)
