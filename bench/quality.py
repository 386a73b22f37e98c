"""``python -m bench quality --data DIR``: filter, matched pools and lists of one data set, beside the baselines.

Trains runs at default settings, or reuses finished ones; for the filter alone, runs without a step.
A model's row is the mean over seeds: every metric is averaged over the seeds' runs under the same resamples of users,
and the interval is that of the averages. So intervals exclude seed variance; the seeds' own values stand beside.
Differences are paired: both sides under the same resamples. Everything is fitted before T_valid, but for calibration
and thresholds, which valid gives. Settings are chosen with ``--split valid``; the test split is for the end.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import numbers
from bench.machine import device_name, versions, write_result
from bench.predictions import predictions_of
from bench.runs import data_of, trained
from negfast.data.log import EventLog, events_before
from negfast.evaluate.bootstrap import interval, ranked_totals
from negfast.evaluate.eval import baselines_of, check_predictions, similarity_of
from negfast.evaluate.metrics import FILTER_SHARE, Samples
from negfast.evaluate.predictions import Predictions, verdict_predictions
from negfast.evaluate.sets import EvalSet, engine_set
from negfast.evaluate.table import (
    HEADLINE,
    evaluation,
    metric_samples,
    paired_differences,
    print_table,
    resampled,
    summary,
)
from negfast.runtime.run_folder import RunFolder

METRICS = ("mean_reward", *HEADLINE)
VERDICT = "verdict"
COLD_USER, FEW = "filter_auc/cold_user", 3  # fewer events than this before the moment
STRATA = ("FHR@20/cold", "filter_auc/cold", COLD_USER)
SHOWN = (*METRICS, "filter_likes_lost_per_dislike", "filter_ece", *STRATA)
RIVALS = ("item-rate", "boosted", "boosted-plus")
WITHOUT_STEPS = ("align.steps=0", "sft.steps=0", "grpo.steps=0")


def run(
    out: Path | None = None,
    data: Path | None = None,
    context: str = "day",
    seeds: str = "0,1,2",
    filter_only: bool = False,
    runs: Path = Path("runs/quality"),
    config: Path | None = None,
    preset: str = "quickstart",
    split: str = "test",
    sasrec: bool = False,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Puts the rows of a data set in a context beside those that ``out`` holds, and prints them.

    Without ``data`` it is the embedded MovieTweetings. Runs of ``seeds`` (comma-separated) lie in
    ``runs``/DATA/CONTEXT-N; finished ones are reused. With ``filter_only`` they have no step and lie in
    ``runs``/DATA/CONTEXT-filter-N. ``sasrec`` adds the baselines that are trained.
    """
    chosen = numbers(seeds, "--seeds")
    name = "movietweetings" if data is None else data.name
    base, finished = runs / name / (f"{context}-filter" if filter_only else context), list[RunFolder]()
    for seed in chosen:
        settings = (f"train.seed={seed}", f"history.context={context}", *(WITHOUT_STEPS if filter_only else ()))
        folder = data if data is not None else data_of(finished)
        finished.append(trained(Path(f"{base}-{seed}"), config, preset, folder, settings))
    engine = finished[0].finished_engine(None)
    sets = {part: engine_set(engine, part) for part in ("valid", "test")}
    evalset = sets[split]
    predictions, columns = baselines_of(engine, sets, split, sasrec)
    predictions |= predictions_of(finished[0], ["prior"], evalset, engine.config.reward)
    for number, done in enumerate(finished):
        print(f"quality: {done.path}", file=sys.stderr, flush=True)
        verdict = done.finished_engine(None).policy.verdict
        predictions[f"{VERDICT}#{number}"] = verdict_predictions(verdict, evalset, columns, done.calibration)
        if not filter_only:
            found = predictions_of(done, ["sft", "grpo"], evalset, engine.config.reward)
            predictions |= {f"{stage}#{number}": lists for stage, lists in found.items()}
    check_predictions(engine.log, evalset, predictions)
    samples = metric_samples(evalset, predictions, similarity_of(engine), resamples)
    add_cold_users(samples, predictions, engine.log, evalset, resamples)
    rows, averaged = table_rows(predictions, samples)
    pairs = [(VERDICT, rival) for rival in RIVALS if rival in averaged]
    pairs += [("grpo", other) for other in averaged if "grpo" in averaged and other != "grpo"]
    entry = {
        "data": name,
        **summary(evalset),
        "seeds": chosen,
        "rows": rows,
        "differences": paired_differences(averaged, pairs, METRICS),
    }
    print_table(evaluation(evalset, rows))
    kept: list[dict[str, Any]] = json.loads(out.read_text())["entries"] if out is not None and out.exists() else []
    kept = [old for old in kept if (old["data"], old["filter_context"]) != (name, context)]
    made_by = {"device": device_name(), "versions": versions("negfast", "torch", "scikit-learn")}
    result = {**made_by, "entries": [*kept, entry]}
    if out is not None:
        write_result(out, result)
    return result


def add_cold_users(
    samples: Mapping[str, Samples],
    predictions: Mapping[str, Predictions],
    log: EventLog,
    evalset: EvalSet,
    resamples: int,
) -> None:
    """`COLD_USER` to the samples of every filter."""
    weights, _, of_event = resampled(evalset, resamples, 0)
    user = evalset.filter_user
    cold = events_before(log, user, evalset.filter_moment) - log.user_offsets[user] < FEW
    for name, predicted in predictions.items():
        if predicted.filter_score is not None:
            score, dislike = predicted.filter_score[cold], evalset.filter_dislike[cold]
            samples[name][COLD_USER] = ranked_totals(weights, of_event[cold], score, dislike, FILTER_SHARE).auc


def table_rows(
    predictions: Mapping[str, Predictions], samples: Mapping[str, Samples]
) -> tuple[list[dict[str, Any]], dict[str, Samples]]:
    """A row for each name, "name#seed" averaged over seeds, and the averaged samples."""
    members: dict[str, list[str]] = {}
    for name in predictions:
        members.setdefault(name.partition("#")[0], []).append(name)
    rows, averaged = [], {}
    for name, parts in members.items():
        averaged[name] = {
            metric: np.mean([samples[part][metric] for part in parts], axis=0) for metric in samples[parts[0]]
        }
        row: dict[str, Any] = {"name": name, "kind": predictions[parts[0]].kind}
        row |= {metric: interval(averaged[name][metric]) for metric in SHOWN if metric in averaged[name]}
        if "#" in parts[0]:
            heads = [metric for metric in METRICS if metric in averaged[name]]
            row["by_seed"] = {metric: [_figure(samples[part][metric]) for part in parts] for metric in heads}
        rows.append(row)
    return rows, averaged


def _figure(samples: np.ndarray) -> float | None:
    return None if np.isnan(samples[0]) else float(samples[0])
