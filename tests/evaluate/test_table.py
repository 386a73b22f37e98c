"""Rows, paired differences, JSON and the printed table."""

import io
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from negfast.data.log import EventLog
from negfast.data.split import split_requests
from negfast.evaluate.metrics import Costs
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.evaluate.table import evaluate_rows, evaluation, metric_samples, paired_differences, print_table


@pytest.fixture
def test_set(random_log: Callable[..., EventLog]) -> EvalSet:
    log = random_log(9, n_users=50, n_items=90, n_events=3000)
    return evaluation_set(log, split_requests(log, 5, 15_025, 15_042), "test")


def guess(evalset: EvalSet, seed: int, skill: float = 0.0, kind: str = "model") -> Predictions:
    rng = np.random.default_rng(seed)
    rows = len(evalset.requests)
    pool = rng.random(evalset.pool_items.shape)
    pool[:, 0] += skill
    return Predictions(
        generated=np.stack([rng.permutation(90)[:50] for _ in range(rows)]).astype(np.int32),
        filter_score=np.clip(rng.random(len(evalset.filter_user)) * 0.5 + skill * evalset.filter_dislike, 0, 1),
        filter_is_probability=True,
        filter_threshold=0.4,
        pool_score=pool,
        kind=kind,
    )


def test_json_has_the_contract_shape(test_set: EvalSet) -> None:
    only_pool = Predictions(pool_score=np.zeros(test_set.pool_items.shape), kind="baseline")
    predictions = {"item-rate": only_pool, "sft": guess(test_set, 1)}
    found = json.loads(
        json.dumps(evaluation(test_set, evaluate_rows(test_set, predictions, resamples=50)), allow_nan=False)
    )
    assert found["split"] == "test" and found["requests"] == len(test_set.requests)
    assert found["primary_requests"] == test_set.primary.sum() <= found["requests"]
    assert found["users"] == len(set(test_set.requests.user.tolist()))
    assert [(row["name"], row["kind"]) for row in found["rows"]] == [("item-rate", "baseline"), ("sft", "model")]
    sft = found["rows"][1]
    for metric in ("FHR@5", "FHR@20", "FHR@20/all", "filter_auc", "filter_reduction", "pool_hr@10", "pool_auc"):
        assert sft[metric].keys() == {"mean", "low", "high"}
        assert sft[metric]["low"] <= sft[metric]["mean"] <= sft[metric]["high"]
    assert "FHR@20" not in found["rows"][0] and "soft_FHR@20" not in sft
    assert sum(point["events"] for point in sft["filter_reliability"]) == found["filter_events"]


def test_same_seed_same_rows(test_set: EvalSet) -> None:
    predictions = {"a": guess(test_set, 1)}
    first = evaluate_rows(test_set, predictions, resamples=40, seed=3)
    assert first == evaluate_rows(test_set, predictions, resamples=40, seed=3)
    other = evaluate_rows(test_set, predictions, resamples=40, seed=4)
    assert first[0]["FHR@20"]["mean"] == other[0]["FHR@20"]["mean"]
    assert first[0]["FHR@20"]["low"] != other[0]["FHR@20"]["low"]


def test_paired_differences(test_set: EvalSet) -> None:
    """A row against itself differs by exactly nothing; pairing is tighter than two intervals apart."""
    base = guess(test_set, 1)
    assert base.filter_score is not None
    near = replace(base, filter_score=base.filter_score + 0.02 * test_set.filter_dislike)
    samples = metric_samples(test_set, {"base": base, "near": near, "skilled": guess(test_set, 2, 0.3)}, resamples=200)
    for row in paired_differences(samples, [("base", "base")]):
        assert (row["mean"], row["low"], row["high"]) == (0.0, 0.0, 0.0)
    (row,) = paired_differences(samples, [("near", "base")], ["filter_auc"])
    assert {"a": "near", "b": "base", "metric": "filter_auc"}.items() <= row.items()
    assert 0 < row["low"] <= row["mean"] <= row["high"]
    single = evaluate_rows(test_set, {"base": base}, resamples=200)[0]["filter_auc"]
    assert row["high"] - row["low"] < 0.5 * (single["high"] - single["low"])
    skilled = {r["metric"]: r["low"] for r in paired_differences(samples, [("skilled", "base")])}
    assert skilled["filter_auc"] > 0 and skilled["pool_auc"] > 0
    assert skilled["FHR@20"] < 0.1


def test_a_table_a_question_fits_and_sets_models_below_baselines(test_set: EvalSet) -> None:
    predictions = {"grpo": guess(test_set, 1), "recent-all-14d": guess(test_set, 2, 0.2, kind="baseline")}
    predictions["sasrec-dislikes"] = Predictions(generated=guess(test_set, 3).generated, kind="baseline")
    costs = Costs(dislike=3, like=1)
    rows = evaluate_rows(test_set, predictions, resamples=20, costs=costs)
    out = io.StringIO()
    print_table(evaluation(test_set, rows, costs), Console(file=out, width=100))
    text = out.getvalue()
    lines = [line.split() for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    names = [words[0] for words in lines if words and words[0] in predictions]
    scored = ["recent-all-14d", "grpo"]
    assert names == [*scored, *scored, "recent-all-14d", "sasrec-dislikes", "grpo", *scored]  # no row of empty cells
    of_first = next(words for words in lines if words[:1] == ["recent-all-14d"])
    assert f"{rows[1]['filter_reduction']['mean'] * 100:.1f}" in of_first
    assert text.count('context "day"') == 2  # the filter and the costs
    assert " ".join(text.split()).count("P(dislike) >= 1 / (1 + 3) = 0.250") == 1


def test_a_sample_is_said(random_log: Callable[..., EventLog], test_set: EvalSet) -> None:
    """In the JSON and under the sizes; of a whole split nothing is said."""
    log = random_log(9, n_users=50, n_items=90, n_events=3000)
    part = evaluation_set(log, split_requests(log, 5, 15_025, 15_042), "test", most=20)
    texts = []
    for evalset in (part, test_set):
        out = io.StringIO()
        found = evaluation(evalset, evaluate_rows(evalset, {"a": guess(evalset, 1)}, resamples=20))
        print_table(found, Console(file=out, width=100))
        texts.append(" ".join(out.getvalue().split()))
        assert ("drawn_from" in found) == (evalset is part)
    assert found["requests"] > len(part.requests)
    assert (
        "a sample: users, and pools where there are many, are drawn by a hash" in texts[0]
        and "a sample" not in texts[1]
    )
    assert f"the whole split has {found['requests']:,} requests of {found['users']:,} users" in texts[0]


def test_costs_are_in_json_only_when_given(test_set: EvalSet) -> None:
    predictions = {"a": guess(test_set, 1), "list": Predictions(generated=guess(test_set, 2).generated)}
    plain = evaluation(test_set, evaluate_rows(test_set, predictions, resamples=20))
    costs = Costs(dislike=3, like=1)
    found = evaluation(test_set, evaluate_rows(test_set, predictions, resamples=20, costs=costs), costs)
    assert "costs" not in plain and found["costs"] == {"dislike": 3, "like": 1, "threshold": 0.25}
    added = {"withheld_share", "dislikes_avoided_share", "likes_withheld_share", "saved_per_1000"}
    scored, lists = found["rows"]
    assert scored.keys() - plain["rows"][0].keys() == added and lists == plain["rows"][1]
    assert {key: value for key, value in scored.items() if key not in added} == plain["rows"][0]


def test_predictions_of_another_set_are_refused(test_set: EvalSet) -> None:
    good = guess(test_set, 1)
    assert good.filter_score is not None and good.pool_score is not None and good.generated is not None
    for bad, message in (
        (replace(good, generated=good.generated[:, :20]), "generated has shape"),
        (replace(good, filter_score=good.filter_score[1:]), "filter_score has shape"),
        (replace(good, pool_score=np.where(good.pool_score > 0.5, np.nan, 0.0)), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_rows(test_set, {"model": bad}, resamples=5)
