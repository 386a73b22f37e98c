"""The last month of the embedded logs, replayed event by event: a live run answers as `score` on a data set with the
same events does, with feedback that is repeated, changed and withdrawn."""

import csv
from pathlib import Path

import numpy as np
import pytest
import zstandard

import negfast
from negfast.data.dataset import Dataset, write_dataset
from negfast.data.log import DAY, EXPOSED, LIKE, WITHDRAWN
from negfast.files import atomic_directory
from negfast.prepare.samples import MOVIETWEETINGS, POLIS
from tests.tiny import run_cli, train_arguments

Row = tuple[str, str, int, str, str]  # user, item, time, label, value

LATE = {"movietweetings": 30 * DAY, "polis": 30 * DAY}  # seconds at the log's end that are replayed
USERS, ITEMS, MOMENTS = 12, 150, 15
LABELS = {EXPOSED: "shown", LIKE: "like", WITHDRAWN: "withdrawn"}


def read_lines(path: Path) -> list[str]:
    return zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().decode().splitlines()


def movietweetings() -> tuple[list[Row], list[list[str]]]:
    rows = [line.split("::") for line in read_lines(MOVIETWEETINGS / "ratings.dat.zst")]
    items = [line.split("::") for line in read_lines(MOVIETWEETINGS / "movies.dat.zst")]
    return [(u, i, int(t), "dislike" if int(r) <= 5 else "like", r) for u, i, r, t in rows], items


def polis() -> tuple[list[Row], list[list[str]]]:
    rows = list(csv.reader(read_lines(POLIS / "events.tsv.zst")[1:], delimiter="\t"))
    items = list(csv.reader(read_lines(POLIS / "items.tsv.zst")[1:], delimiter="\t"))
    return [(u, i, int(t), label, "") for u, i, t, label, *_ in rows], [[i, text, kind] for i, kind, text in items]


def with_changes(rows: list[Row], until: int) -> list[Row]:
    """The rows, and after some of them the same feedback again, the other one, or none any more."""
    rng = np.random.default_rng(0)
    more = []
    for user, item, time, label, value in rows:
        draw, later = rng.random(), time + int(rng.integers(1, 2 * DAY))
        if label not in ("like", "dislike") or draw > 0.15 or later >= until:
            continue
        other = "dislike" if label == "like" else "like"
        more.append((user, item, later, [label, other, "withdrawn"][int(draw / 0.05)], value))
    return [*rows, *more]


def write_table(path: Path, header: list[str], rows: list) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    return path


def withdraw(prepared: Path, out: Path, withdrawn: set[tuple[str, str, int]]) -> None:
    """Writes a data set whose events of ``withdrawn`` take feedback back. (Files cannot say that without a recipe.)"""
    data = Dataset.open(prepared)
    log, users, items = data.log, data.user_ids, data.items.ids
    rows = zip(log.user.tolist(), log.item.tolist(), log.time.tolist(), strict=True)
    taken = np.array([(users[user], items[item], time) in withdrawn for user, item, time in rows])
    assert taken.sum() == len(withdrawn) > 20
    log.feedback[taken] = WITHDRAWN
    if log.value is not None:
        log.value[taken] = np.nan
    manifest = {key: value for key, value in data.manifest.items() if key not in ("files", "format")}
    with atomic_directory(out) as directory:
        write_dataset(directory, log, users, data.items, {"codes": data.codes, **data.semantic_ids}, manifest)


@pytest.mark.slow
@pytest.mark.parametrize(("sample", "context"), [("movietweetings", "day"), ("polis", "event")])
def test_the_last_month_replayed_is_a_data_set_of_it(tmp_path, sample, context):
    rows, items = {"movietweetings": movietweetings, "polis": polis}[sample]()
    end = (max(row[2] for row in rows) // DAY + 1) * DAY
    cut = end - LATE[sample]
    early = [row for row in rows if row[2] < cut]
    late = with_changes([row for row in rows if row[2] >= cut], end)
    header = ["user", "item", "time", "label", "rating"]
    items_file = write_table(tmp_path / "items.tsv", ["item", "text", "kind"], items)
    files = [write_table(tmp_path / f"{name}.tsv", header, part) for name, part in (("early", early), ("late", late))]
    command = ["--items", str(items_file), "--item-text-column", "text", "--item-attributes", "kind:|"]
    command += ["--dislike", "label==dislike", "--like-rule", "label==like", "--encoder", "tfidf"]
    command += ["--value-column", "rating"] if sample == "movietweetings" else []
    base, joined, whole = (tmp_path / name for name in ("base", "joined", "whole"))
    run_cli("prepare", str(files[0]), *command, "--out", str(base))
    run_cli("prepare", str(files[1]), "--like", str(base), "--out", str(joined))
    withdraw(joined, whole, {(user, item, time) for user, item, time, label, _ in late if label == "withdrawn"})
    run = tmp_path / "run"
    run_cli(*train_arguments(base, run, history__context=context, history__window=64, align__steps=0, grpo__steps=0))
    compare(run, whole, cut)


def compare(run: Path, whole_data: Path, cut: int) -> None:
    live, batch = negfast.load(run).live(), negfast.load(run, whole_data)
    engine = batch._engine
    log, users, items = engine.log, engine.data.user_ids, engine.data.items.ids
    rows = np.flatnonzero(log.time >= cut)
    rows = rows[np.argsort(log.time[rows], kind="stable")]
    rng = np.random.default_rng(0)
    busy = np.argsort(-np.bincount(log.user[rows], minlength=len(users)))[: USERS // 2]  # asked at each moment
    times = log.time[rows[np.sort(rng.choice(len(rows), MOMENTS, replace=False))]] + rng.integers(0, 2, MOMENTS)
    moments = np.unique([live.moment(int(time)) for time in times[times > live.since]])
    moments = moments[moments > live.since]
    assert len(moments) > 5
    done = asked = known = 0
    worst, seen = 0.0, []
    for moment in moments.tolist():
        for row in rows[done : done + int(np.searchsorted(log.time[rows[done:]], moment))].tolist():
            value = None if log.value is None or np.isnan(log.value[row]) else float(log.value[row])
            feedback = LABELS.get(int(log.feedback[row]), "dislike")
            live.add(users[log.user[row]], items[log.item[row]], int(log.time[row]), feedback, value)
            done += 1
        met = np.flatnonzero([user in live.users for user in users])  # by now
        user = np.repeat([*np.intersect1d(busy, met), *rng.choice(met, USERS // 2, replace=False)], ITEMS)
        item = rng.choice(log.item[rows], len(user))
        at = np.datetime64(moment, "s")
        pairs = np.array(users)[user], np.array(items)[item]
        found, expected = live.score(*pairs, at=at), batch.score(*pairs, at=at)
        assert np.array_equal(found.abstain, expected.abstain)
        worst = max(worst, float(np.nanmax(np.abs(found.probability - expected.probability))))
        seen.append(expected.probability[~expected.abstain])
        wanted = engine.features.rich(user, item, np.full(len(user), moment))
        for one in np.unique(user[~expected.abstain]):
            of_one = np.flatnonzero((user == one) & ~expected.abstain)
            index = np.array([live.items[items[k]] for k in item[of_one]], np.int32)
            answer = live.features.state.answer(live.users[users[one]], index, moment)
            assert np.array_equal(answer, wanted[of_one], equal_nan=True)
        asked, known = asked + len(user), known + int((~expected.abstain).sum())
    print(f"{done:,} events, {len(moments)} moments, {known:,} of {asked:,} candidates known, worst {worst:.1e}")
    assert known > asked / 2 and done > len(rows) / 2
    assert np.std(np.concatenate(seen)) > 1e-3
    assert worst < 1e-6
