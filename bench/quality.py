"""``python -m bench quality``: the final table. Trains a run a seed, or finds it finished, and measures all once.

A model's row is the mean over seeds: every metric is averaged over the seeds' runs under the same resamples of users,
and the interval is that of the averages; so it speaks of users, and the seeds' own values stand beside it. Differences
are paired: both sides under the same resamples. Settings are chosen with ``--split valid``; the test split is for the
end.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import device_name, versions, write_result
from bench.runs import data_of, trained
from negfast.collab import co_dislike_neighbours, content_neighbours
from negfast.config import Reward
from negfast.data.split import Requests
from negfast.evaluate.baselines import baseline_predictions
from negfast.evaluate.bootstrap import interval
from negfast.evaluate.metrics import Samples, reliability_curve
from negfast.evaluate.model import calibrate, predict_set
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.report import HEADLINE, metric_samples, paired_differences, print_table, summary
from negfast.evaluate.run import check_predictions, model_predictions, similarity_of
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.model.prompts import MIXED
from negfast.run_folder import RunFolder
from negfast.sid.prior import NEXT_DISLIKE
from negfast.train.checkpoint import load_weights
from negfast.train.engine import Engine
from negfast.train.reward import build_reward_table
from negfast.train.rollout import rollout

STRATA = (
    *("FHR@20/all", "FHR@20/cold", "FHR@20/no_past_dislike"),
    *(f"{m}/{s}" for m in ("filter_auc", "pool_hr@10", "pool_auc") for s in ("cold", "no_past_dislike")),
)
METRICS = (*HEADLINE, "FHR@5", "FHR@10", "FHR@50", "soft_FHR@20", *STRATA)
MODELS = ("sft", "grpo", "sft-long")
REWARD_ANSWERS = 32  # sampled a request for the mean reward


def run(
    out: Path | None = None,
    seeds: str = "0,1,2",
    runs: Path = Path("runs/quality"),
    config: Path | None = None,
    preset: str = "quickstart",
    data: Path | None = None,
    long: Path | None = None,
    split: str = "test",
    sasrec: str = "yes",
    resamples: int = 1000,
) -> dict[str, Any]:
    """Writes the table of ``split`` over the ``seeds`` (comma-separated) to ``out``, and prints it.

    Runs lie in ``runs``/seed-N. ``long`` is a configuration whose final weights give the row ``sft-long``, SFT for the
    compute of SFT and GRPO together (``runs``/long-N). ``sasrec`` "no" leaves out the baselines that are trained.
    """
    chosen = [int(seed) for seed in seeds.split(",")]
    finished: list[RunFolder] = []
    for seed in chosen:
        folder = data if data is not None else data_of(finished)
        finished.append(trained(runs / f"seed-{seed}", config, preset, folder, (f"train.seed={seed}",)))
    longer = []
    for seed in chosen if long is not None else []:
        longer.append(trained(runs / f"long-{seed}", long, preset, finished[0].data, (f"train.seed={seed}",)))

    engine = finished[0].finished_engine(None)
    sets = {name: evaluation_set(engine.log, engine.split, name) for name in ("valid", "test")}
    evalset, valid = sets[split], sets["valid"]
    _say("baselines")
    answers = baseline_predictions(
        engine.log, engine.data.items, list(sets.values()), engine.data.valid_day, trained=sasrec == "yes"
    )
    predictions: dict[str, Predictions] = dict(answers[list(sets).index(split)])
    rewards: dict[str, list[float]] = {name: [] for name in MODELS}
    for seed, done in zip(chosen, finished, strict=True):
        _say(f"seed {seed}")
        engine = done.finished_engine(None)
        found = model_predictions(done, engine, evalset, valid)
        predictions |= {"prior": found.pop("prior")} | {f"{name}#{seed}": answer for name, answer in found.items()}
        for name, weights in (("sft", done.checkpoints / "sft"), ("grpo", done.final)):
            load_weights(weights, engine.policy)
            rewards[name].append(mean_reward(engine, evalset.requests, engine.config.reward))
    for seed, done in zip(chosen, longer, strict=False):
        _say(f"sft-long, seed {seed}")
        long_engine = done.finished_engine(None)
        predictions[f"sft-long#{seed}"] = predict_set(long_engine, evalset, calibrate(long_engine, valid))
        rewards["sft-long"].append(mean_reward(long_engine, evalset.requests, engine.config.reward))
    check_predictions(engine.log, evalset, predictions)

    samples = metric_samples(evalset, predictions, similarity_of(engine), resamples)
    rows, averaged = table_rows(evalset, predictions, samples)
    result = {
        **summary(evalset),
        "seeds": chosen,
        "frozen_at": "valid",  # nothing was learned from T_valid on, by no row
        "rows": rows,
        "differences": paired_differences(averaged, compared(averaged), METRICS),
        "grpo_minus_sft": grpo_minus_sft(chosen, samples, rewards),
        "device": device_name(),
        "versions": versions("negfast", "torch", "scikit-learn"),
    }
    print_table(evalset, rows)
    for line in difference_lines(result["differences"]):
        print(line)
    if out is not None:
        write_result(out, result)
    return result


def table_rows(
    evalset: EvalSet, predictions: Mapping[str, Predictions], samples: Mapping[str, Samples]
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
        answers = [predictions[part] for part in parts]
        row: dict[str, Any] = {"name": name, "kind": answers[0].kind}
        row |= {metric: interval(values) for metric, values in averaged[name].items()}
        if "#" in parts[0]:
            heads = [metric for metric in HEADLINE if metric in averaged[name]]
            row["by_seed"] = {metric: [_figure(samples[part][metric]) for part in parts] for metric in heads}
        scores = [answer.filter_score for answer in answers if answer.filter_score is not None]
        if scores and answers[0].filter_is_probability:  # of all seeds together
            dislikes = np.tile(evalset.filter_dislike, len(scores))
            row["filter_reliability"] = reliability_curve(np.concatenate(scores), dislikes)
        rows.append(row)
    return rows, averaged


def compared(averaged: Mapping[str, Samples]) -> list[tuple[str, str]]:
    """The pairs of rows whose differences are reported: every model row with every other row before it."""
    names = list(averaged)
    return [(a, b) for a in MODELS if a in averaged for b in names if names.index(b) < names.index(a)]


def grpo_minus_sft(
    seeds: Sequence[int], samples: Mapping[str, Samples], rewards: Mapping[str, list[float]]
) -> list[dict[str, Any]]:
    """A seed each: the differences of mean reward and headline metrics; also against ``sft-long`` where it is there."""
    out = []
    for place, seed in enumerate(seeds):
        entry: dict[str, Any] = {"seed": seed}
        for other, prefix in (("sft", ""), ("sft-long", "vs_long_")):
            if not rewards[other]:
                continue
            entry[f"{prefix}reward"] = rewards["grpo"][place] - rewards[other][place]
            for metric in HEADLINE:
                a, b = samples[f"grpo#{seed}"][metric], samples[f"{other}#{seed}"][metric]
                entry[f"{prefix}{metric}"] = interval(a - b)
        out.append(entry | {f"reward_{name}": values[place] for name, values in rewards.items() if values})
    return out


@torch.no_grad()
def mean_reward(engine: Engine, requests: Requests, settings: Reward) -> float:
    """The mean reward of items sampled from the policy for requests with a non-empty F, on mixed prompts.

    Co-dislikes are counted before T_valid, as in training; the same request draws from the same random numbers for
    every policy.
    """
    neighbours = co_dislike_neighbours(engine.log, engine.data.valid_day)
    content = content_neighbours(engine.data.embedding, settings.content_threshold)
    total = 0.0
    for start in range(0, len(requests), engine.config.eval.batch):
        rows = np.arange(start, min(start + engine.config.eval.batch, len(requests)))
        part = requests.take(rows)
        batch = engine.prompts.build(part.user, part.day, MIXED, REWARD_ANSWERS, tail="next-dislike")
        ids = torch.from_numpy(rows).to(engine.device)
        sampled = rollout(engine.policy, engine.chooser, batch, ids, NEXT_DISLIKE, REWARD_ANSWERS, 0, 0)
        table = build_reward_table(part, engine.log.n_items, settings, neighbours, content, engine.device)
        terms = table.look_up(torch.arange(len(rows), device=engine.device)[:, None], sampled.items)
        total += float(terms.sum())
    return total / (len(requests) * REWARD_ANSWERS)


def difference_lines(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """The headline differences of the models and their strongest rivals, for reading."""
    rivals = ("decay-4d", "item-rate", "logistic", "boosted", "boosted-plus", "sft")
    return [
        f"{d['a']:>8} - {d['b']:<12} {d['metric']:<26} {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
        for d in differences
        if d["b"] in rivals and d["metric"] in HEADLINE and d["mean"] is not None and d["low"] is not None
    ]


def _figure(samples: np.ndarray) -> float | None:
    return None if np.isnan(samples[0]) else float(samples[0])


def _say(what: str) -> None:
    print(f"quality: {what}", file=sys.stderr, flush=True)
