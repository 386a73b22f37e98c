"""What serving promises beside the main job: going on after a kill, abstaining, profiles of users."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from negfast.data.dataset import Dataset, date_of
from negfast.data.log import DISLIKE, EXPOSED, LIKE, EventLog
from negfast.runtime import verdict
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.verdict import candidate_logits, group_candidates
from negfast.serve import predict
from negfast.serve.context import context_day
from negfast.serve.parts import write_in_parts
from negfast.serve.profiles import category_matrix, feedback_matrices
from negfast.serve.score import knows
from tests.tiny import run_cli

SCHEMA = pa.schema([("n", pa.int64())])


def rows(start: int, stop: int) -> pa.Table:
    return pa.table({"n": list(range(start, stop))}, schema=SCHEMA)


class Killed(BaseException):
    pass


def test_parts_go_on_where_they_were_killed(tmp_path):
    out, asked = tmp_path / "out.parquet", []

    def make(start: int, stop: int, until: int = 10**9) -> pa.Table:
        if start >= until:
            raise Killed
        asked.append(start)
        return rows(start, stop)

    with pytest.raises(Killed):
        write_in_parts(out, SCHEMA, {"a": 1}, 25, 10, lambda a, b: make(a, b, until=20), ("x", "rows"))
    assert not out.exists()
    write_in_parts(out, SCHEMA, {"a": 1}, 25, 10, make, ("x", "rows"))
    assert asked == [0, 10, 20]  # nothing twice
    assert parquet.read_table(out)["n"].to_pylist() == list(range(25))
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_parts_of_another_question_are_not_used(tmp_path):
    out = tmp_path / "out.parquet"

    def dies(start: int, stop: int) -> pa.Table:
        if start:
            raise Killed
        return rows(100, 100 + stop - start)

    with pytest.raises(Killed):
        write_in_parts(out, SCHEMA, {"at": "Monday"}, 20, 10, dies, ("x", "rows"))
    write_in_parts(out, SCHEMA, {"at": "Tuesday"}, 20, 10, rows, ("x", "rows"))
    assert parquet.read_table(out)["n"].to_pylist() == list(range(20))


def test_predict_in_batches_is_predict_at_once(tiny_run, tmp_path, monkeypatch):
    run_cli("predict", str(tiny_run), "--top", "5", "--out", str(tmp_path / "once.parquet"))
    monkeypatch.setattr(predict, "USERS_AT_ONCE", 50)
    run_cli("predict", str(tiny_run), "--top", "5", "--out", str(tmp_path / "parts.parquet"))
    once, parts = (parquet.read_table(tmp_path / f"{name}.parquet") for name in ("once", "parts"))
    assert parquet.ParquetFile(tmp_path / "parts.parquet").num_row_groups == 3  # of 120 users
    assert once.drop(["score"]).equals(parts.drop(["score"]))
    assert np.allclose(once["score"].to_numpy(), parts["score"].to_numpy(), rtol=1e-4)


def test_a_time_with_a_zone_is_a_day_of_utc():
    """Nothing after the moment is looked at, wherever the caller's clock hangs."""
    day = 86_400
    log = EventLog(np.array([0, 2]), np.array([0, 1]), np.array([LIKE, LIKE]), np.array([0, 30 * day]), None, 2)
    for at, last in (("1970-01-11", 9), ("1970-01-11T12:00", 9), ("1970-01-11T01:00+05:00", 8)):
        assert context_day(log, at) == last


def test_answers_of_a_run_that_knows_later_days_say_so(tiny_run, tmp_path):
    learned = date_of(RunFolder(tiny_run).learned_until)
    out = ["--top", "2", "--out", str(tmp_path / "x.parquet")]
    assert "learned from events" not in run_cli("predict", str(tiny_run), "--at", learned, *out)
    day_before = date_of(RunFolder(tiny_run).learned_until - 1)
    said = run_cli("predict", str(tiny_run), "--at", day_before, *out)
    assert f"note: {tiny_run} learned from events before {learned}, so its answers know of them" in said


def test_many_candidates_of_one_user_are_answered_in_parts(tiny_run, monkeypatch):
    engine = RunFolder(tiny_run).finished_engine(None)
    users, day = np.repeat([3, 5, 6], [90, 1, 40]), int(engine.log.day.max()) + 1
    items = np.concatenate([np.arange(90), [7], np.arange(40)])
    candidates = group_candidates(users, np.full(len(users), day), items)
    whole = candidate_logits(engine, candidates)
    monkeypatch.setattr(verdict, "CANDIDATES_AT_ONCE", 32)
    parts = candidates.split(32)
    assert np.diff(parts.offsets).tolist() == [32, 32, 26, 1, 32, 8] and parts.user.tolist() == [3, 3, 3, 5, 6, 6]
    np.testing.assert_allclose(candidate_logits(engine, candidates), whole, atol=1e-5)


def test_knows():
    log = EventLog(  # user 0: an exposure to item 0 on day 1, a like of item 1 on day 3; user 1: nothing before day 5
        np.array([0, 2, 3]), np.array([0, 1, 2]), np.array([EXPOSED, LIKE, DISLIKE], np.uint8),
        np.array([1, 3, 5]) * 86_400, None, 4,
    )  # fmt: skip
    user, item = np.array([0, 1, 1, 1, -1, 0]), np.array([3, 0, 1, 2, 1, -1])
    assert knows(log, user, item, 3).tolist() == [True, False, True, False, False, False]
    assert knows(log, user, item, 1).tolist() == [True, False, False, False, False, False]
    assert knows(log, user, item, 0).tolist() == [False] * 6


def test_score_abstains_where_nothing_is_known(tiny_run, tmp_path):
    data = Dataset.open(RunFolder(tiny_run).data)
    user, item = data.user_ids[3], data.items.ids[4]
    asked, out = tmp_path / "asked.parquet", tmp_path / "scored.parquet"
    parquet.write_table(pa.table({"user": [user, "nobody", user], "item": [item, item, "nothing"]}), asked)
    said = run_cli("score", str(tiny_run), str(asked), "--out", str(out))
    scored = parquet.read_table(out)
    assert scored.column_names == ["user", "item", "score", "abstain"]
    assert scored["abstain"].to_pylist() == [False, True, True] and scored["score"].is_null().to_pylist() == [
        False,
        True,
        True,
    ]
    assert "abstained: 2 of 3 pairs" in said
    parquet.write_table(pa.table({"user": [[user]], "item": [item]}), asked)
    message = run_cli("score", str(tiny_run), str(asked), "--out", str(out), code=2)
    assert "column 'user': found list" in message and "expected strings or integers" in message
    parquet.write_table(pa.table({"user": ["nobody"], "item": [item]}), asked)
    assert "no user is known, the first is 'nobody'" in run_cli(
        "score", str(tiny_run), str(asked), "--out", str(out), code=2
    )


def test_matrices_of_history():
    names, matrix = category_matrix([("b", "a"), (), ("a", "a")])
    assert names == ["a", "b"] and matrix.toarray().tolist() == [[1, 1], [0, 0], [1, 0]]
    log = EventLog(  # a dislike that became a like; an exposure takes nothing back; one after the day
        np.array([0, 4]), np.array([0, 0, 1, 1]), np.array([DISLIKE, LIKE, DISLIKE, EXPOSED], np.uint8),
        np.array([1, 2, 3, 4]) * 86_400, None, 2,
    )  # fmt: skip
    bad, good = feedback_matrices(log, 4)
    assert bad.toarray().tolist() == [[0, 1]] and good.toarray().tolist() == [[1, 0]]
    bad, good = feedback_matrices(log, 1)
    assert bad.toarray().tolist() == [[1, 0]] and good.toarray().tolist() == [[0, 0]]
    bad, good = feedback_matrices(replace(log, feedback=np.zeros(4, np.uint8)), 4)
    assert bad.nnz == good.nnz == 0


def test_profiles_count_what_the_log_holds(tiny_run, tmp_path):
    out = tmp_path / "profiles.parquet"
    run_cli("user-profiles", str(tiny_run), "--attribute", "genre", "--out", str(out))
    data = Dataset.open(RunFolder(tiny_run).data)
    found = {(row["user"], row["category"]): row for row in parquet.read_table(out).to_pylist()}
    log, genre = data.log, [values[0] for values in data.items.attributes["genre"]]
    bad, good = {}, {}
    for u, i, f in zip(log.user.tolist(), log.item.tolist(), log.feedback.tolist(), strict=True):  # no pair twice
        counts = bad if f == DISLIKE else good
        counts[data.user_ids[u], genre[i]] = counts.get((data.user_ids[u], genre[i]), 0) + 1
    for key in bad.keys() | good.keys():
        assert (found[key]["dislikes"], found[key]["likes"]) == (bad.get(key, 0), good.get(key, 0))
    everyone = sum(bad.values()) / (sum(bad.values()) + sum(good.values()))
    user, category = next(iter(bad))
    n_bad, n_good = (sum(v for (_, c), v in counts.items() if c == category) for counts in (bad, good))
    of_all = (n_bad + 5 * everyone) / (n_bad + n_good + 5)
    expected = (bad[user, category] + 5 * of_all) / (bad[user, category] + good.get((user, category), 0) + 5)
    row = found[user, category]
    assert row["dislike_rate"] == pytest.approx(expected, rel=1e-5) and row["lift"] == pytest.approx(expected / of_all)
    shares = {}
    for (name, _), row in found.items():
        shares[name] = shares.get(name, 0) + row["expected_share"]
    assert all(share == pytest.approx(1, abs=1e-4) for share in shares.values()) and len(shares) == log.n_users
    message = run_cli("user-profiles", str(tiny_run), "--attribute", "colour", "--out", str(out), code=2)
    assert "--attribute 'colour'" in message and "have genre" in message
