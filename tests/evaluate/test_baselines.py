"""Baselines against slow readings, and the proof that none reads an event after its context."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from negfast.data.features import HistoryFeatures
from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog
from negfast.data.split import all_requests, draw_users, split_requests
from negfast.evaluate.baselines import baseline_predictions, knn, rates
from negfast.evaluate.baselines.knn import knn_predictions
from negfast.evaluate.baselines.ranking import first_items
from negfast.evaluate.baselines.rates import fit_scorers, rate_predictions
from negfast.evaluate.predictions import TOP, Predictions, check_generated, threshold_for_share
from negfast.evaluate.sets import EvalSet, evaluation_set, set_columns
from negfast.evaluate.table import evaluate_rows, evaluation, print_table

MakeLog = Callable[..., EventLog]
MakeItems = Callable[..., ItemTable]
VALID, TEST = 15_025, 15_042


def predict(log: EventLog, items: ItemTable, evalsets: list[EvalSet], fit_until: int) -> list[dict[str, Predictions]]:
    features = HistoryFeatures.smoothed(log, items, fit_until, "day")
    return baseline_predictions(features, evalsets, set_columns(features, evalsets), fit_until)


def sets_of(log: EventLog) -> list[EvalSet]:
    split = split_requests(log, 5, VALID, TEST)
    return [evaluation_set(log, split, name) for name in ("valid", "test")]


def slow_scores(name: str, log: EventLog, user: int, day: int) -> np.ndarray:
    """The score of every item for a request, an event at a time."""
    score = np.zeros(log.n_items)
    events = list(zip(log.user.tolist(), log.item.tolist(), log.feedback.tolist(), log.day.tolist(), strict=True))
    if name.startswith("knn"):
        counted = [(u, i, d) for u, i, f, d in events if f == DISLIKE or name == "knn-all"]
        holders: dict[int, set[int]] = {}
        for u, i, d in counted:
            if d < VALID:
                holders.setdefault(i, set()).add(u)
        for j in {i for u, i, d in counted if u == user and d <= day} & set(holders):
            for i, users in holders.items():
                c = len(users & holders[j])
                score[i] += c / (c + 5) * c / np.sqrt((len(users) + 3) * (len(holders[j]) + 3))
        return score
    for _, i, f, d in events:
        if d > day or (f != DISLIKE and name != "recent-all-14d"):
            continue
        age = day - d
        score[i] += {
            "popularity": 1.0,
            "recent-7d": age < 7,
            "recent-14d": age < 14,
            "decay-4d": 0.5 ** (age / 4),
            "recent-all-14d": age < 14,
        }[name]
    return score


@pytest.mark.parametrize("n_items", [60, 150])  # fewer and more unseen items than are asked for
def test_rankings_and_neighbours(random_log: MakeLog, random_items: MakeItems, n_items: int) -> None:
    log = random_log(n_items, n_items=n_items, n_events=1200)
    _, test = sets_of(log)
    (answers,) = predict(log, random_items(0, n_items), [test], VALID)
    requests = test.requests
    padded = False
    for row in range(0, len(requests), 6):
        user, day = int(requests.user[row]), int(requests.day[row])
        own = slice(log.user_offsets[user], log.user_offsets[user + 1])
        seen = set(log.item[own][log.day[own] <= day].tolist())
        events = np.bincount(log.item[log.day <= day], minlength=n_items)
        for name in ("popularity", "recent-7d", "recent-14d", "decay-4d", "recent-all-14d", "knn-dislikes", "knn-all"):
            score = np.round(slow_scores(name, log, user, day), 9)
            unseen = sorted(set(range(n_items)) - seen, key=lambda i: (-score[i], -events[i], i))[:TOP]
            generated = answers[name].generated
            assert generated is not None
            found = generated[row][generated[row] >= 0].tolist()
            padded |= len(found) < TOP
            if name.startswith("knn"):  # sums in another order may swap items whose scores differ by rounding
                assert score[found] == pytest.approx(score[unseen], abs=1e-9)
                positive = int((score[unseen] > 0).sum())
                assert set(found[:positive]) <= set(np.flatnonzero(score).tolist())
                assert found[positive:] == unseen[positive:]
            else:
                assert found == unseen, name
    assert padded == (n_items == 60)
    for pool in range(0, len(test.pool_items), 9):
        user, day = int(test.pool_user[pool]), int(test.pool_day[pool])
        for name in ("popularity", "decay-4d", "recent-all-14d"):
            pool_score = answers[name].pool_score
            assert pool_score is not None
            np.testing.assert_allclose(
                pool_score[pool], slow_scores(name, log, user, day)[test.pool_items[pool]], atol=1e-9
            )
    for answer in answers.values():
        if answer.generated is not None:
            check_generated(log, requests, answer.generated)


def last_feedback(log: EventLog, day: int) -> dict[tuple[int, int], tuple[bool, float]]:
    """The like or dislike that counts at the start of ``day`` for each pair: (disliked, value)."""
    counts: dict[tuple[int, int], tuple[bool, float]] = {}
    value = log.value if log.value is not None else np.zeros(len(log))
    columns = (log.user, log.item, log.feedback, log.day, value)
    for u, i, f, d, v in zip(*(column.tolist() for column in columns), strict=True):
        if d < day and f != EXPOSED:
            counts[u, i] = (f == DISLIKE, v)
    return counts


def test_features_count_the_last_feedback_of_a_pair(random_log: MakeLog, random_items: MakeItems) -> None:
    log, items = random_log(4, n_users=15, n_items=20, n_events=900), random_items(4, 20)
    prior, prior_value = 0.25, 3.0
    features = HistoryFeatures(log, items, prior, prior_value, "day")
    rng = np.random.default_rng(0)
    n = 150
    user, item = rng.integers(0, 15, n), rng.integers(0, 20, n)
    day = rng.integers(15_000 - 2, 15_000 + 63, n)
    full = features.rich(user, item, day * DAY)[:, : features.n_full]

    def rate(pairs: list[tuple[bool, float]]) -> float:
        return (sum(d for d, _ in pairs) + 5 * prior) / (len(pairs) + 5)

    def mean(pairs: list[tuple[bool, float]]) -> float:
        return (sum(v for _, v in pairs) + 5 * prior_value) / (len(pairs) + 5)

    for q in range(n):
        counts = last_feedback(log, int(day[q]))
        of_user = [x for (u, _), x in counts.items() if u == user[q]]
        of_item = [x for (_, i), x in counts.items() if i == item[q]]
        ratings = [v for _, v in of_user]
        logits = [np.log(rate(x) / (1 - rate(x))) for x in (of_item, of_user)]
        expected = [*logits, np.log1p(len(of_item)), np.log1p(len(of_user)), mean(of_item), mean(of_user)]
        expected.append(np.std(ratings) if len(ratings) > 1 else np.nan)
        np.testing.assert_allclose(full[q, :7], expected, rtol=1e-6, atol=1e-6)
        genres = items.attributes["genres"][item[q]]
        for column, whose in ((7, [user[q]]), (8, range(15))):
            rates = [
                rate([x for (u, i), x in counts.items() if u in whose and genre in items.attributes["genres"][i]])
                for genre in genres
            ]
            np.testing.assert_allclose(full[q, column], np.mean(rates) if rates else np.nan, rtol=1e-6)
        assert full[q, 9:13].sum() == len(genres)
        assert full[q, 15] == float(items.attributes["year"][item[q]][0])


def altered_after(log: EventLog, day: int, seed: int = 0) -> EventLog:
    """The same log up to the end of ``day``; after it other items, other feedback, other values."""
    return altered_from(log, (day + 1) * DAY, seed)


def altered_from(log: EventLog, moment: int, seed: int = 0) -> EventLog:
    """The same log before ``moment``; from it on other items, other feedback, other values."""
    rng = np.random.default_rng(seed)
    late = np.flatnonzero(log.time >= moment)
    item, feedback = log.item.copy(), log.feedback.copy()
    item[late] = rng.permutation(item[late])
    feedback[late] = np.where(feedback[late] == DISLIKE, LIKE, DISLIKE)
    value = None
    if log.value is not None:
        value = log.value.copy()
        value[late] = rng.permutation(value[late]) + 1
    return replace(log, item=item, feedback=feedback, value=value)


def differing(a: Predictions, b: Predictions, evalset: EvalSet, first: int, last: int) -> dict[str, bool]:
    """Whether answers whose context ends on a day from first to last differ, for each answer given."""

    def within(day: np.ndarray) -> np.ndarray:
        return (first <= day) & (day <= last)

    rows = {
        "generated": within(evalset.requests.day),
        "filter_score": within(evalset.filter_moment // DAY - 1),
        "pool_score": within(evalset.pool_day),
    }
    assert all(chosen.sum() > 5 for chosen in rows.values())
    return {
        field: bool((getattr(a, field)[chosen] != getattr(b, field)[chosen]).any())
        for field, chosen in rows.items()
        if getattr(a, field) is not None
    }


@pytest.mark.job
@pytest.mark.parametrize("values", [True, False])
def test_no_baseline_reads_the_future(random_log: MakeLog, random_items: MakeItems, values: bool) -> None:
    log = random_log(11, n_users=60, n_items=80, n_events=5000, values=values)
    items = random_items(11, 80)
    _, test = sets_of(log)
    (truth,) = predict(log, items, [test], VALID)
    day = TEST + 6
    (other,) = predict(altered_after(log, day), items, [test], VALID)
    assert truth.keys() == other.keys()
    for name, answer in truth.items():
        leaks = differing(answer, other[name], test, 0, day)
        assert leaks and not any(leaks.values()), (name, leaks)
    # The same look sees what it should see: events before the context do change the answers.
    (other,) = predict(altered_after(log, day - 4), items, [test], VALID)
    for name, answer in truth.items():
        assert all(differing(answer, other[name], test, day - 3, day).values()), name


def test_in_event_context_all_before_the_second_counts(random_log: MakeLog, random_items: MakeItems) -> None:
    """Rates see the same day's earlier events; nothing of the second itself or later changes an answer."""
    log, items = random_log(13, n_users=60, n_items=80, n_events=5000), random_items(13, 80)
    moment = int(np.sort(log.time[log.day == TEST])[20])
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(60), np.arange(80)))
    asked = user, item, np.full(len(user), moment)
    features = HistoryFeatures.smoothed(log, items, VALID, "event")
    truth, _ = fit_scorers(features, VALID)
    for start, same in ((moment, True), (TEST * DAY, False)):
        changed = HistoryFeatures.smoothed(altered_from(log, start), items, VALID, "event")
        other, _ = fit_scorers(changed, VALID)
        for name, score in truth.items():
            assert (score(features.rich(*asked)) == other[name](changed.rich(*asked))).all() == same, name


@pytest.mark.job
def test_nothing_fitted_sees_the_days_after_the_fit(random_log: MakeLog, random_items: MakeItems) -> None:
    """Contexts that end where the fit does are answered alike, whatever happens from then on; a refit differs."""
    log = random_log(12, n_users=60, n_items=80, n_events=5000)
    items = random_items(12, 80)
    _, test = sets_of(log)
    first_day = {
        "filter_user": test.filter_user[test.filter_moment == TEST * DAY],
        "filter_item": test.filter_item[test.filter_moment == TEST * DAY],
        "filter_moment": test.filter_moment[test.filter_moment == TEST * DAY],
    }
    small = replace(test, **first_day)
    (refit,) = predict(log, items, [small], TEST)
    (altered,) = predict(altered_after(log, TEST - 1), items, [small], TEST)
    (early,) = predict(log, items, [small], VALID)
    for name in ("item-rate", "user-rate", "logistic", "boosted"):
        again, after, before = (found[name].filter_score for found in (refit, altered, early))
        assert again is not None and after is not None and before is not None
        assert (again == after).all() and (again != before).any(), name


@pytest.mark.parametrize("seed", range(2))
def test_contexts_do_not_depend_on_the_future(random_log: MakeLog, seed: int) -> None:
    """Requests, strata and filter contexts of days up to d, and futures that end by d, survive a changed future."""
    log = random_log(seed)
    day = TEST + 6
    other = altered_after(log, day)
    a, b = all_requests(log, 5), all_requests(other, 5)
    early = a.day <= day
    assert (a.user[early] == b.user[early]).all() and (a.day[early] == b.day[early]).all()
    closed = a.day + 5 <= day
    for field in ("dislikes", "likes", "dislike_offsets", "like_offsets"):
        assert (getattr(a.take(closed), field) == getattr(b.take(closed), field)).all()
    for old, new in zip(sets_of(log), sets_of(other), strict=True):
        assert (old.cold_item == new.cold_item).all()
        for x, y in ((old, new), (new, old)):
            request = {(u, d): p for u, d, p in zip(x.requests.user, x.requests.day, x.past_dislike, strict=True)}
            for u, d, p in zip(y.requests.user, y.requests.day, y.past_dislike, strict=True):
                assert d > day or request.get((u, d), p) == p
        known = old.filter_moment <= day * DAY
        assert (old.filter_user[known] == new.filter_user[new.filter_moment <= day * DAY]).all()
        assert (old.filter_past_dislike[known] == new.filter_past_dislike[new.filter_moment <= day * DAY]).all()


def test_a_log_without_values_and_attributes(random_log: MakeLog) -> None:
    log = random_log(7, values=False)
    evalsets = sets_of(log)
    bare = ItemTable(ids=[str(i) for i in range(log.n_items)], text=[""] * log.n_items)
    valid, test = predict(log, bare, evalsets, VALID)
    assert list(test) == [
        *("popularity", "recent-7d", "recent-14d", "decay-4d", "recent-all-14d", "knn-dislikes", "knn-all"),
        *("item-rate", "user-rate", "logistic", "boosted", "boosted-plus"),
    ]
    for name in ("item-rate", "user-rate", "logistic", "boosted", "boosted-plus"):
        score = valid[name].filter_score
        assert score is not None and ((score > 0) & (score < 1)).all()
        assert valid[name].filter_threshold is None
        assert test[name].filter_threshold == threshold_for_share(score)
    assert len(evaluate_rows(evalsets[1], test, resamples=10)) == 12


def test_a_log_without_likes_leaves_the_fitted_baselines_out(random_log: MakeLog, random_items: MakeItems) -> None:
    log = random_log(8)
    log = replace(log, feedback=np.where(log.feedback == LIKE, EXPOSED, log.feedback).astype(np.uint8))
    _, test = sets_of(log)
    (answers,) = predict(log, random_items(8), [test], VALID)
    assert "boosted" not in answers and "logistic" not in answers and "item-rate" in answers
    rows = {row["name"]: row for row in evaluate_rows(test, answers, resamples=10)}
    assert rows["item-rate"]["filter_auc"] == {"mean": None, "low": None, "high": None}


def test_sets_without_a_request_have_a_filter_and_no_list(random_log: MakeLog, random_items: MakeItems) -> None:
    log, items = random_log(6), random_items(6)
    valid, test = sets_of(log)
    (whole,) = predict(log, items, [test], VALID)
    for bare, scored in zip(
        (valid, test), predict(log, items, [valid.of_filter(), test.of_filter()], VALID), strict=True
    ):
        rows = {row["name"]: row for row in evaluate_rows(bare.of_filter(), scored, resamples=10)}
        assert list(rows) == list(whole)
        for name, row in rows.items():
            assert ("filter_auc" in row) == (whole[name].filter_score is not None)
            assert all(row[metric]["mean"] is None for metric in ("FHR@20", "pool_hr@10") if metric in row)
    assert whole["boosted"].filter_score is not None and scored["boosted"].filter_score is not None
    assert (scored["boosted"].filter_score == whole["boosted"].filter_score).all()


@pytest.mark.parametrize("most", [1, 30, 90, 400])
def test_the_first_items_are_those_of_a_whole_sort(most: int) -> None:
    rng = np.random.default_rng(most)
    for levels in (1, 3, 300):
        score, events = rng.integers(0, levels, 300) / 4, rng.integers(0, 5, 300).astype(float)
        whole = np.lexsort((-events, -score))
        assert first_items(score, events, most).tolist() == whole[:most].tolist()


def test_neighbours_of_a_large_log_are_counted_over_users_drawn(random_log: MakeLog, monkeypatch) -> None:
    """Small users alone, until they have enough pairs, and the nearest neighbours alone; said, and the same again."""
    log = random_log(5, n_users=80, n_items=150, n_events=4000)
    test = sets_of(log)[1]
    whole = knn_predictions(log, [test], VALID)[0]
    assert whole["knn-all"].note == ""
    monkeypatch.setattr(knn, "PAIRS", 8000)
    monkeypatch.setattr(knn, "MOST_ITEMS", 40)
    few, again = (knn_predictions(log, [test], VALID)[0]["knn-all"] for _ in range(2))
    early = log.before(VALID)
    sizes = np.array([len(np.unique(log.item[early & (log.user == user)])) for user in range(log.n_users)])
    users = draw_users(np.flatnonzero((sizes > 0) & (sizes <= 40)), [(sizes[(sizes > 0) & (sizes <= 40)] ** 2, 8000)])
    assert few.note.startswith(f"counts items of {len(users)} of {int((sizes > 0).sum())} users")
    assert few.generated is not None and again.generated is not None and whole["knn-all"].generated is not None
    assert (few.generated == again.generated).all() and (few.generated != whole["knn-all"].generated).any()
    check_generated(log, test.requests, few.generated)
    monkeypatch.setattr(knn, "MOST_NEIGHBOURS", 3)
    fewer = knn_predictions(log, [test], VALID)[0]["knn-all"].generated
    assert fewer is not None and (fewer != few.generated).any()


def test_models_of_a_large_log_are_fitted_to_a_draw(random_log: MakeLog, random_items: MakeItems, monkeypatch) -> None:
    log, items = random_log(2, n_events=4000), random_items(2)
    monkeypatch.setattr(rates, "EXAMPLES", 200)
    test = sets_of(log)[1]
    features = HistoryFeatures.smoothed(log, items, VALID, "day")
    (found,) = rate_predictions(features, [test], set_columns(features, [test]), VALID)
    assert found["boosted"].note == found["logistic"].note and found["item-rate"].note == ""
    assert found["boosted"].note.startswith("fitted to 200 of ")
    out = io.StringIO()
    table = evaluation(test, evaluate_rows(test, found, resamples=10))
    print_table(table, Console(file=out, width=100))
    assert f"boosted-plus: {found['boosted-plus'].note}" in out.getvalue()
