"""Communities of their own time: each is split where its own events say, and nothing of one part is in another."""

import json
from pathlib import Path

import numpy as np
import pytest

from negfast.data.dataset import CUTS, Dataset
from negfast.data.log import DAY
from negfast.data.split import first_feedback
from negfast.errors import InputError
from negfast.evaluate.sets import evaluation_set
from negfast.prepare import readers, reading, sorter
from negfast.prepare.append import append_events
from negfast.prepare.events import Events
from negfast.prepare.writing import count_parts
from negfast.runtime.engine import requests_before
from negfast.runtime.verdict import first_feedback_candidates
from tests.tiny import prepare_log, run_cli, train_arguments, write_log

YEAR = 365 * DAY


def write_places(folder: Path) -> tuple[Path, Path]:
    """The tiny log in two places, of other users and items, the second two years later; events and items tell them."""
    lines: list[str] = []
    table: list[str] = []
    for place, shift in (("here", 0), ("there", 2 * YEAR)):
        (folder / place).mkdir()
        events, items = write_log(folder / place, seed=len(lines))
        for line in events.read_text().splitlines()[1:]:
            user, item, rating, time = line.split(",")
            lines.append(f"{place}-{user},{place}-{item},{rating},{int(time) + shift},{place}")
        table += [f"{place}-{line},{place}" for line in items.read_text().splitlines()[1:]]
    (folder / "events.csv").write_text("\n".join(["user,item,rating,time,place", *lines]) + "\n")
    (folder / "items.csv").write_text("\n".join(["item,title,genre,where", *table]) + "\n")
    return folder / "events.csv", folder / "items.csv"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    return prepare_log(folder, *write_places(folder), "--split-within", "where")


def test_each_community_is_split_by_its_own_time(places):
    data = Dataset.open(places)
    log, split = data.log, data.split()
    community = np.array([name.split("-")[0] for name in data.user_ids])
    assert {key: data.manifest["split"][key] for key in ("within", "communities")} == {
        "within": "where",
        "communities": 2,
    }
    train, until_test = log.before(data.valid_day), log.before(data.test_day)
    assert log.before(data.end_day).all() and data.valid_day > log.day.max()
    for place in ("here", "there"):
        mine = community[log.user] == place
        time = np.sort(log.time[mine])
        valid, test = time[int(0.76 * len(time))], time[int(0.88 * len(time))]
        assert (train[mine] == (log.time[mine] < valid)).all() and (until_test[mine] == (log.time[mine] < test)).all()
        end, far = (time[-1] // DAY + 1) * DAY, data.horizon * DAY
        for requests, low, high in ((split.train, 0, valid), (split.valid, valid, test), (split.test, test, end)):
            of = requests.take(community[requests.user] == place)
            assert len(of) > 20 and (of.moment > low).all() and (of.moment + far <= high).all()
    parts = {"train": split.train, "valid": split.valid, "test": split.test}
    days = int(log.day.min()), int(log.day.max())
    counted = count_parts(data.shard, data.horizon, data.valid_day, data.test_day, days, data.cuts)
    assert counted == {name: (len(part), int(part.has_dislikes.sum())) for name, part in parts.items()}
    closed = requests_before(data, data.valid_day)
    assert closed.moment.tolist() == split.train.moment.tolist()
    assert closed.take().dislikes.tolist() == split.train.take().dislikes.tolist()


def test_evaluation_and_training_share_no_event(places):
    data = Dataset.open(places)
    log = data.log
    learned, _ = first_feedback_candidates(log, "event", 0, data.valid_day)
    seen = {(int(u), int(i)) for u, i in zip(learned.user, learned.item, strict=True)}
    for name in ("valid", "test"):
        asked = evaluation_set(log, data.split(), name, context="event")
        pairs = {(int(u), int(i)) for u, i in zip(asked.filter_user, asked.filter_item, strict=True)}
        assert len(pairs) == len(asked.filter_user) > 300 and not pairs & seen
        seen |= pairs
    assert len(seen) == len(first_feedback(log))
    cold = np.ones(log.n_items, bool)
    cold[log.item[log.before(data.valid_day)]] = False
    assert (asked.cold_item == cold).all()


def test_a_column_of_the_events_gives_the_same_split(places, tmp_path, monkeypatch):
    """In blocks of any size, and with repeats that are dropped."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(reading, "CHUNK_EVENTS", 50)
    monkeypatch.setattr(sorter, "BATCH_ROWS", 100)
    events, items = write_places(tmp_path)
    lines = events.read_text().splitlines()
    events.write_text("\n".join([*lines, *lines[-500:]]) + "\n")
    options = ["--split-within", "place", "--drop-repeats"]
    of_events = Dataset.open(prepare_log(tmp_path, events, items, *options))
    of_items = Dataset.open(places)
    assert of_events.log.cuts is not None and of_items.log.cuts is not None
    assert (of_events.log.cuts.moments == of_items.log.cuts.moments).all()
    assert of_events.manifest["split"] == of_items.manifest["split"] | {"within": "place"}


@pytest.mark.parametrize(
    ("column", "options", "said"),
    [
        ("nowhere", [], "no column 'nowhere' for --split-within; the events have user, item, rating, time, place"),
        ("place", ["--valid", "2020-11-01"], "--split-within: expected neither --valid nor --test beside it"),
        ("rating", [], "expected one community for each user and item"),
    ],
)
def test_what_cannot_be_split_within_is_said_in_a_line(tmp_path, column, options, said):
    events, items = write_places(tmp_path)
    command = ["prepare", str(events), "--items", str(items), "--dislike", "rating<=2", "--out", str(tmp_path / "data")]
    assert said in run_cli(*command, "--split-within", column, *options, code=2)
    assert not (tmp_path / "data").exists()


def test_an_item_without_a_community_is_refused(tmp_path):
    events, items = write_places(tmp_path)
    lines = items.read_text().splitlines()
    items.write_text("\n".join([line.removesuffix("there") for line in lines]) + "\n")
    command = ["prepare", str(events), "--items", str(items), "--dislike", "rating<=2", "--out", str(tmp_path / "data")]
    assert "item 'there-i" in run_cli(*command, "--split-within", "where", code=2)


def test_an_event_without_a_community_is_refused(tmp_path):
    events, items = write_places(tmp_path)
    lines = events.read_text().splitlines()
    events.write_text("\n".join([*lines[:4], lines[4].removesuffix("here"), *lines[5:]]) + "\n")
    command = ["prepare", str(events), "--items", str(items), "--dislike", "rating<=2", "--out", str(tmp_path / "data")]
    said = run_cli(*command, "--split-within", "place", code=2)
    assert "events.csv, line 5: no place, expected a community for --split-within" in said


def test_no_events_are_added_to_communities(places, tmp_path):
    events, _ = write_places(tmp_path)
    command = ["prepare", str(events), "--like", str(places), "--out", str(tmp_path / "more")]
    assert "is split within 'where'" in run_cli(*command, code=2)
    data = Dataset.open(places)
    before = (places / CUTS).read_bytes()
    with pytest.raises(InputError, match="is split within 'where'"):
        append_events(places, Events(data.log, data.user_ids, data.items.ids))
    assert (places / CUTS).read_bytes() == before


@pytest.mark.job
def test_training_evaluation_and_refit_in_event_context(places, tmp_path):
    """From communities to a table: every stage asks the split's one function."""
    run, again = tmp_path / "run", tmp_path / "again"
    run_cli(*train_arguments(places, run, history__context="event"))
    table = json.loads(run_cli("eval", str(run), "--json").splitlines()[-1])
    rows = {row["name"]: row for row in table["rows"]}
    assert table["filter_context"] == "event" and table["filter_events"] > 300
    assert rows["verdict"]["filter_auc"]["mean"] > 0.6
    run_cli("train", "--refit", str(run), "--whole-log", "--out", str(again))
    assert "cannot measure it" in run_cli("eval", str(again), code=2)
