"""`prepare --like`: a log cut in two gives the log that it was; old items keep their IDs; what must be refused."""

import json

import numpy as np
import pytest

from negfast.data.dataset import Dataset, date_of
from negfast.errors import InputError
from negfast.prepare.daily import prepare_like
from negfast.prepare.events import Selection
from negfast.serve.profiles import feedback_matrices
from tests.tiny import run_cli, write_log

PREPARE = ["--dislike", "rating<=2", "--value-column", "rating", "--item-text-column", "title", "--item-attributes",
           "genre", "--encoder", "tfidf", "--codebook", "16", "--horizon", "5"]  # fmt: skip


def silent(_):
    pass


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The tiny log whole, and cut: events of the last 6 days and the items that only they have come later."""
    folder = tmp_path_factory.mktemp("daily")
    events, items = write_log(folder)
    header, *rows = events.read_text().splitlines()
    cut = max(int(row.split(",")[3]) for row in rows) - 6 * 86_400
    late = {f"i{i}" for i in range(70, 90)}
    early = [row for row in rows if int(row.split(",")[3]) <= cut and row.split(",")[1] not in late]
    after = [row for row in rows if int(row.split(",")[3]) > cut]
    items_header, *titles = items.read_text().splitlines()
    files = {"early.csv": [header, *early], "day.csv": [header, *after], "whole.csv": [header, *early, *after],
             "few.csv": [items_header, *(t for t in titles if t.split(",")[0] not in late)],
             "late.csv": [items_header, *(t for t in titles if t.split(",")[0] in late)]}  # fmt: skip
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    run_cli(
        "prepare", str(folder / "early.csv"), "--items", str(folder / "few.csv"), *PREPARE, "--out", str(folder / "a")
    )
    command = ["prepare", str(folder / "day.csv"), "--like", str(folder / "a"), "--items", str(folder / "late.csv")]
    run_cli(*command, "--out", str(folder / "b"))
    run_cli("prepare", str(folder / "whole.csv"), "--items", str(items), *PREPARE, "--out", str(folder / "all"))
    return folder


def triples(data: Dataset) -> list[tuple]:
    log = data.log
    assert log.value is not None
    user, item = np.array(data.user_ids)[log.user], np.array(data.items.ids)[log.item]
    return sorted(zip(user, item, log.feedback.tolist(), log.time.tolist(), log.value.tolist(), strict=True))


def test_the_joined_log_is_the_whole_log(parts):
    joined, whole = Dataset.open(parts / "b"), Dataset.open(parts / "all")
    assert triples(joined) == triples(whole)
    log = joined.log
    assert (np.diff(log.time)[np.diff(log.user) == 0] >= 0).all()
    joined.verify()
    assert joined.manifest["counts"] == {**whole.manifest["counts"]}


def test_old_items_and_users_keep_their_place_and_their_codes(parts):
    old, new = Dataset.open(parts / "a"), Dataset.open(parts / "b")
    n = len(old.items)
    assert n == 70 and len(new.items) == 90
    assert new.items.ids[:n] == old.items.ids and new.user_ids[: len(old.user_ids)] == old.user_ids
    np.testing.assert_array_equal(new.codes[:n], old.codes)
    np.testing.assert_array_equal(new.semantic_ids["codebooks"], old.semantic_ids["codebooks"])
    assert len(np.unique(new.codes, axis=0)) == 90
    assert new.extends == [old.fingerprint] and Dataset.open(parts / "all").extends == []
    assert new.items.attributes["genre"][n:] and new.items.text[n].startswith("The ")


def test_new_items_lie_with_their_like(parts):
    """The codes of the tiny log follow its four genres: a new item shares its first code with items of its own."""
    new = Dataset.open(parts / "b")
    genre, first = np.array([g for (g,) in new.items.attributes["genre"]]), new.codes[:, 0]
    agrees = [
        (genre[:70][first[:70] == first[i]] == genre[i]).mean() for i in range(70, 90) if (first[:70] == first[i]).any()
    ]
    assert len(agrees) >= 15 and np.mean(agrees) > 0.8


def test_the_split_moves_with_the_end_of_the_log(parts, tmp_path):
    old, new = Dataset.open(parts / "a"), Dataset.open(parts / "b")
    moved = int(new.log.day.max()) - int(old.log.day.max())
    assert moved == 6
    assert (new.valid_day - old.valid_day, new.test_day - old.test_day) == (moved, moved)
    kept = [date_of(old.valid_day), date_of(old.test_day)]
    command = ["prepare", str(parts / "day.csv"), "--like", str(parts / "a"), "--items", str(parts / "late.csv")]
    run_cli(*command, "--valid", kept[0], "--test", kept[1], "--out", str(tmp_path / "c"))
    assert Dataset.open(tmp_path / "c").valid_day == old.valid_day


def test_a_day_comes_once(parts, tmp_path):
    with pytest.raises(InputError, match=r"holds all [\d,]+ events already"):
        prepare_like([parts / "day.csv"], parts / "b", tmp_path / "c", report=silent)
    assert not (tmp_path / "c").exists()


def test_new_events_before_all_others_are_warned_of(parts, tmp_path):
    few = (parts / "day.csv").read_text().splitlines()[:60]  # too few to call one of them stray
    (tmp_path / "log.csv").write_text("\n".join([*few, "u1,i1,1,0"]) + "\n")
    said: list[str] = []
    prepare_like([tmp_path / "log.csv"], parts / "a", tmp_path / "c", report=said.append)
    assert any(line.startswith("warning: new events begin on 1970-01-01") for line in said)
    cut = Selection(first_day=10)
    assert (
        triples(prepare_like([tmp_path / "log.csv"], parts / "a", tmp_path / "d", selection=cut, report=silent))[0][3]
        > 0
    )


def test_bad_rows_of_a_new_day_are_skipped(parts, tmp_path):
    (tmp_path / "log.csv").write_text((parts / "day.csv").read_text() + "null,i1,1,5\nu1,i1,1\n")
    command = ["prepare", str(tmp_path / "log.csv"), "--like", str(parts / "a"), "--items", str(parts / "late.csv")]
    assert "found 3 fields, expected 4" in run_cli(*command, "--out", str(tmp_path / "c"), code=2)
    shown = run_cli(*command, "--skip-bad-rows", "--json", "--out", str(tmp_path / "c"))
    assert '"left_out": {"bad_rows": 2, "held_already": 0}' in shown
    assert triples(Dataset.open(tmp_path / "c")) == triples(Dataset.open(parts / "b"))


def test_events_that_are_held_already_are_skipped_and_counted(parts, tmp_path):
    """A file that overlaps with what the data set holds adds what is new in it."""
    header, *rows = (parts / "day.csv").read_text().splitlines()
    (tmp_path / "half.csv").write_text("\n".join([header, *rows[::2]]) + "\n")
    command = ["--items", str(parts / "late.csv"), "--out"]
    run_cli("prepare", str(tmp_path / "half.csv"), "--like", str(parts / "a"), *command, str(tmp_path / "half"))
    shown = run_cli("prepare", str(parts / "day.csv"), "--like", str(tmp_path / "half"), "--out", str(tmp_path / "c"))
    assert f"events: {len(rows[::2]):,} are in" in shown
    assert triples(Dataset.open(tmp_path / "c")) == triples(Dataset.open(parts / "b"))


def test_new_items_without_a_table_are_cold(parts, tmp_path):
    said: list[str] = []
    new = prepare_like([parts / "day.csv"], parts / "a", tmp_path / "c", report=said.append)
    assert any("without a row in an item table" in line for line in said)
    assert (new.codes[70:, 0] == 15).all()  # the cold prefix


def test_what_new_items_lack_is_said_and_recorded(parts, tmp_path):
    new = Dataset.open(parts / "b").manifest
    assert {"day.csv", "late.csv"} <= {source["name"] for source in new["sources"].values()}
    assert "items_without_embedding" not in new
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(70, 4)).astype(np.float32))
    command = ["prepare", str(parts / "early.csv"), "--items", str(parts / "few.csv"), *PREPARE]
    run_cli(*command, "--item-embedding", str(tmp_path / "vectors.npy"), "--out", str(tmp_path / "own"))
    said: list[str] = []
    own = prepare_like([parts / "day.csv"], tmp_path / "own", tmp_path / "c", report=said.append)
    assert any("those 20 have zeros" in line for line in said)
    assert own.manifest["items_without_embedding"] == 20


def test_options_that_the_data_set_settles_are_refused(parts, tmp_path):
    command = ["prepare", str(parts / "day.csv"), "--like", str(parts / "a"), "--out", str(tmp_path / "c")]
    assert "--horizon has no place beside --like" in run_cli(*command, "--horizon", "3", code=2)
    assert "no such data set" in run_cli("prepare", str(parts / "day.csv"), "--like", str(tmp_path / "no"),
                                         "--out", str(tmp_path / "c"), code=2)  # fmt: skip


def test_two_steps_are_the_same_as_one(parts, tmp_path):
    header, *rows = (parts / "day.csv").read_text().splitlines()
    times = sorted(int(row.split(",")[3]) for row in rows)
    for name, part in (
        ("1.csv", lambda t: t <= times[len(times) // 2]),
        ("2.csv", lambda t: t > times[len(times) // 2]),
    ):
        (tmp_path / name).write_text("\n".join([header, *(r for r in rows if part(int(r.split(",")[3])))]) + "\n")
    prepare_like([tmp_path / "1.csv"], parts / "a", tmp_path / "one", items_path=parts / "late.csv", report=silent)
    two = prepare_like([tmp_path / "2.csv"], tmp_path / "one", tmp_path / "two", report=silent)
    once = Dataset.open(parts / "b")
    assert triples(two) == triples(once)
    np.testing.assert_array_equal(two.codes, once.codes)
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert [source["name"] for source in manifest["sources"].values()].count("2.csv") == 1
    assert manifest["original_items"] == 70


def test_an_undislike_of_a_later_day(tmp_path):
    """Yambda: what is taken back today counts no more from today on; the days before are as they were known."""
    from tests.prepare.test_recipes import yambda

    rng = np.random.default_rng(0)
    dislikes = [(u, 86_400 * d, int(i)) for u in range(8) for d in range(60) for i in rng.choice(40, 1)]
    likes = [(u, 86_400 * d + 5, int(i) + 40) for u in range(8) for d in range(60) for i in rng.choice(40, 1)]
    first = [str(yambda(tmp_path / "dislikes.parquet", dislikes)), str(yambda(tmp_path / "likes.parquet", likes))]
    run_cli("prepare", "--recipe", "yambda", *first, "--codebook", "8", "--out", str(tmp_path / "a"))
    user, _, item = dislikes[-1]
    undo = yambda(tmp_path / "undislikes-61.parquet", [(user, 86_400 * 60, item)])
    old, new = Dataset.open(tmp_path / "a"), prepare_like([undo], tmp_path / "a", tmp_path / "b", report=silent)
    assert new.manifest["counts"] == {**old.manifest["counts"], "events": len(old.log) + 1, "withdrawn": 1}
    user, item = new.user_ids.index(str(user)), new.items.ids.index(str(item))
    assert [feedback_matrices(new.log, day)[0][user, item] for day in (59, 60)] == [1, 0]
