"""``python -m bench quality``: the final table. Trains a run a seed, or reuses a finished one, and evaluates all.

A model's row is the mean over seeds: every metric is averaged over the seeds' runs under the same resamples of users,
and the interval is that of the averages. So intervals exclude seed variance; the seeds' own values stand beside.
Differences are paired: both sides under the same resamples. Settings are chosen with ``--split valid``; the test split
is for the end. The frozen table holds what was fitted before T_valid; the refit table holds models and baselines fitted
before T_test, with their paired differences from the frozen ones.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import numbers
from bench.machine import device_name, versions, write_result
from bench.predictions import predictions_of
from bench.runs import branch, data_of, equal_compute, refitted, trained
from negfast.config import load_config
from negfast.evaluate.bootstrap import interval
from negfast.evaluate.eval import baselines_of, check_predictions, similarity_of
from negfast.evaluate.metrics import Samples
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.sets import EvalSet, engine_set
from negfast.evaluate.table import HEADLINE, evaluation, metric_samples, paired_differences, print_table, summary
from negfast.runtime.run_folder import RunFolder

METRICS = ("mean_reward", *HEADLINE)
STRATA = tuple(f"{m}/{s}" for m in ("FHR@20", "filter_auc") for s in ("cold", "no_past_dislike"))
SHOWN = (*METRICS, "filter_likes_lost_per_dislike", "filter_ece", *STRATA)


def run(
    out: Path | None = None,
    seeds: str = "0,1,2",
    runs: Path = Path("runs/quality"),
    config: Path | None = None,
    preset: str = "quickstart",
    data: Path | None = None,
    split: str = "test",
    long: bool = True,
    align: bool = True,
    refit: bool = True,
    sasrec: bool = True,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Writes the table of ``split`` over the ``seeds`` (comma-separated) to ``out``, and prints it.

    Runs lie in ``runs``/seed-N; finished ones are reused. ``long`` adds the row ``sft-long``
    (``runs``/long-N): SFT that continues from align for as long as the run's SFT and GRPO took together. ``align`` adds
    the rows ``sft-no-align`` and ``grpo-no-align`` (``runs``/no-align-N): all but the align stage. ``refit`` adds the
    table of the final refits (``runs``/refit-N), on the test split only. Without ``sasrec`` the baselines that are
    trained are left out.
    """
    chosen = numbers(seeds, "--seeds")
    finished: list[RunFolder] = []
    for seed in chosen:
        folder = data if data is not None else data_of(finished)
        finished.append(trained(runs / f"seed-{seed}", config, preset, folder, (f"train.seed={seed}",)))
    longer = train_longer(runs, chosen, finished, config, preset) if long else []
    unaligned = train_unaligned(runs, chosen, finished, config, preset) if align else []
    again: list[RunFolder] = []
    if refit and split == "test":
        again = [refitted(runs / f"refit-{seed}", done) for seed, done in zip(chosen, finished, strict=True)]

    engine = finished[0].finished_engine(None)
    sets = {name: engine_set(engine, name) for name in ("valid", "test")}
    result, samples = table(sets, split, chosen, model_rows(finished, longer, unaligned), sasrec, resamples)
    made_by = {"device": device_name(), "versions": versions("negfast", "torch", "scikit-learn")}
    result = {**made_by, **summary(sets[split]), "seeds": chosen, "frozen_at": "valid", **result}
    if longer:
        result["sft_long_steps"] = longer[0].config.sft.steps
    if again:
        refits, refit_samples = table(sets, split, chosen, model_rows(again), sasrec, resamples)
        gained = gains(samples, refit_samples)
        result["refit"] = {"frozen_at": "test", "rows": refits["rows"], "minus_frozen": gained}
    if out is not None:
        write_result(out, result)
    return result


def train_longer(
    runs: Path, seeds: Sequence[int], finished: Sequence[RunFolder], config: Path | None, preset: str
) -> list[RunFolder]:
    """SFT for the compute of SFT and GRPO, a run a seed, from the align weights of the ``finished`` ones."""
    steps = equal_compute(finished[0])
    longer = []
    for seed, done in zip(seeds, finished, strict=True):
        overrides = (f"train.seed={seed}", f"sft.steps={steps}", "grpo.steps=0")
        branch(done, runs / f"long-{seed}", load_config(config, preset, overrides), ("align",))
        longer.append(trained(runs / f"long-{seed}", config, preset, done.data, overrides))
    return longer


def train_unaligned(
    runs: Path, seeds: Sequence[int], finished: Sequence[RunFolder], config: Path | None, preset: str
) -> list[RunFolder]:
    """Runs without the align stage, a run a seed."""
    return [
        trained(runs / f"no-align-{seed}", config, preset, done.data, (f"train.seed={seed}", "align.steps=0"))
        for seed, done in zip(seeds, finished, strict=True)
    ]


def model_rows(
    finished: Sequence[RunFolder], longer: Sequence[RunFolder] = (), unaligned: Sequence[RunFolder] = ()
) -> dict[str, tuple[str, Sequence[RunFolder]]]:
    """The rows of models: the stage whose weights predict, and a run a seed."""
    rows = {
        "sft-no-align": ("sft", unaligned),
        "grpo-no-align": ("grpo", unaligned),
        "sft": ("sft", finished),
        "grpo": ("grpo", finished),
        "sft-long": ("sft", longer),
    }
    return {name: (stage, folders) for name, (stage, folders) in rows.items() if folders}


def table(
    sets: dict[str, EvalSet],
    split: str,
    seeds: Sequence[int],
    models: Mapping[str, tuple[str, Sequence[RunFolder]]],
    sasrec: bool,
    resamples: int,
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """Rows, their differences and GRPO against SFT seed by seed, printed too; and the rows' samples."""
    evalset, valid = sets[split], sets["valid"]
    first = models["grpo"][1][0]
    engine, reward = first.finished_engine(None), first.config.reward
    predictions = baselines_of(engine, sets, split, sasrec)
    predictions |= predictions_of(first, ["prior"], evalset, valid, reward)
    for name, (stage, folders) in models.items():
        for seed, done in zip(seeds, folders, strict=True):
            _say(f"{name}, {done.path}")
            predictions[f"{name}#{seed}"] = predictions_of(done, [stage], evalset, valid, reward)[stage]
    check_predictions(engine.log, evalset, predictions)
    samples = metric_samples(evalset, predictions, similarity_of(engine), resamples)
    rows, averaged = table_rows(predictions, samples)
    differences = paired_differences(averaged, compared(averaged), METRICS)
    print_table(evaluation(evalset, rows))
    for line in difference_lines(differences):
        print(line)
    result = {"rows": rows, "differences": differences, "grpo_minus_sft": grpo_minus_sft(seeds, samples)}
    return result, averaged


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


def compared(averaged: Mapping[str, Samples]) -> list[tuple[str, str]]:
    """The pairs of rows whose differences are reported: ``grpo`` with every row above it."""
    names = list(averaged)
    return [("grpo", other) for other in names[: names.index("grpo")]]


def grpo_minus_sft(seeds: Sequence[int], samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """A seed each: paired differences of mean reward and headline metrics; also against ``sft-long`` where it is
    there."""
    out = []
    for seed in seeds:
        entry: dict[str, Any] = {"seed": seed}
        for other, prefix in (("sft", ""), ("sft-long", "vs_long_")):
            if f"{other}#{seed}" not in samples:
                continue
            a, b = samples[f"grpo#{seed}"], samples[f"{other}#{seed}"]
            entry |= {prefix + metric: interval(a[metric] - b[metric]) for metric in METRICS if metric in a}
        out.append(entry)
    return out


def gains(frozen: Mapping[str, Samples], refit: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """What a row gains by the refit, paired: the same users, resamples and requests."""
    return [
        {"name": name, "metric": metric, **interval(refit[name][metric] - frozen[name][metric])}
        for name in refit
        for metric in METRICS
        if metric in refit[name] and metric in frozen[name]
    ]


def difference_lines(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """The headline differences of the final weights and their strongest rivals, for reading."""
    rivals = ("decay-4d", "item-rate", "logistic", "boosted", "boosted-plus", "sft-no-align", "grpo-no-align", "sft")
    return [
        f"{d['a']:>8} - {d['b']:<12} {d['metric']:<26} {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
        for d in differences
        if d["b"] in rivals and d["metric"] in METRICS and d["mean"] is not None and d["low"] is not None
    ]


def _figure(samples: np.ndarray) -> float | None:
    return None if np.isnan(samples[0]) else float(samples[0])


def _say(what: str) -> None:
    print(f"quality: {what}", file=sys.stderr, flush=True)
