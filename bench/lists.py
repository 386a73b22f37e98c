"""``python -m bench lists``: how far lists of dislikes are a person's. Measures a finished run a seed.

Two questions. Does a list's score rank the item that the user disliked before what others took that day (the matched
pool)? And how alike are the lists of different users, drawn from all with an event up to the split's first day?
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import numbers
from bench.machine import device_name, versions
from negfast.evaluate.bootstrap import interval
from negfast.evaluate.eval import baselines_of
from negfast.evaluate.metrics import Samples
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.sets import POOL, EvalSet, engine_set, pool_candidates
from negfast.evaluate.table import metric_samples, paired_differences, summary
from negfast.runtime.engine import Engine
from negfast.runtime.generation import generate
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.taste import Taste, taste_scores
from negfast.runtime.verdict import candidate_logits
from negfast.serve.predict import requests_at
from negfast.train.expected import item_log_probs

METRICS = ("pool_hr@10", "pool_auc")
BASELINES = ("item-rate", "boosted-plus")
RIVALS = ("item-rate", "boosted-plus", "verdict", "likely")
TOP = 20
WEEK = 7  # days that the prices of their first are kept for


def run(
    runs: Path = Path("runs/quality/movietweetings"),
    seeds: str = "0,1,2",
    split: str = "test",
    users: int = 1000,
    pools: int = 10_000,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Rows of ``split`` for the finished runs ``runs``/day-N, as `bench quality` leaves them: pools of each score, and
    likeness of the lists. At most ``pools`` pools are drawn, and ``users`` users get lists of 20.
    """
    chosen = numbers(seeds, "--seeds")
    predictions: dict[str, Predictions] = {}
    likeness: dict[str, list[dict[str, float]]] = {"likely": [], "taste": []}
    for seed in chosen:
        engine = RunFolder(runs / f"day-{seed}").finished_engine(None)
        sets = {name: fewer_pools(engine_set(engine, name), pools) for name in ("valid", "test")}
        evalset = sets[split]
        start = {"valid": engine.data.valid_day, "test": engine.data.test_day}[split]
        if not predictions:
            found, _ = baselines_of(engine, sets, split, trained=False)
            predictions = {name: Predictions(pool_score=found[name].pool_score) for name in BASELINES}
        _say(f"seed {seed}: pools")
        for name, score in pool_scores(engine, evalset, start).items():
            predictions[f"{name}#{seed}"] = Predictions(pool_score=score)
        _say(f"seed {seed}: lists")
        active = np.unique(engine.log.user[engine.log.day <= start])
        drawn = np.sort(np.random.default_rng(1).permutation(active)[:users]).astype(np.int32)
        likeness["likely"].append(list_likeness(generate(engine, requests_at(drawn, start), TOP)[0]))
        likeness["taste"].append(list_likeness(Taste(engine, start).lists(drawn, TOP)[0]))
    samples = averaged(metric_samples(evalset, predictions, None, resamples))
    rows: list[dict[str, Any]] = []
    for name, of_row in samples.items():
        alike = likeness.get(name, [])
        row = {"name": name} | {metric: interval(of_row[metric]) for metric in METRICS}
        rows.append(row | {key: float(np.mean([of[key] for of in alike])) for of in alike[:1] for key in of})
    differences = paired_differences(samples, [("taste", rival) for rival in RIVALS], METRICS)
    for row in rows:
        print(row)
    for difference in differences:
        print(difference)
    made_by = {"device": device_name(), "versions": versions("negfast", "torch")}
    return {**made_by, **summary(evalset), "seeds": chosen, "users": users, "rows": rows, "differences": differences}


def fewer_pools(evalset: EvalSet, most: int) -> EvalSet:
    """The same with at most ``most`` of its pools, drawn."""
    kept = np.sort(np.random.default_rng(0).permutation(len(evalset.pool_items))[:most])
    return replace(evalset, pool_request=evalset.pool_request[kept], pool_items=evalset.pool_items[kept])


def pool_scores(engine: Engine, evalset: EvalSet, start: int) -> dict[str, np.ndarray]:
    """What a likely list, the verdict alone and a taste list order the pools by, float64 [N, POOL]."""
    n = len(evalset.pool_items)
    items = evalset.pool_items.reshape(-1)
    taste = taste_scores(engine, pool_candidates(evalset))
    week = (evalset.pool_day - start) // WEEK
    for number in np.unique(week):
        ranker, price = Taste(engine, start + int(number) * WEEK), np.zeros(engine.log.n_items)
        price[ranker.shown] = ranker.price
        rows = np.repeat(week == number, POOL)
        taste[rows] -= price[items[rows]]
    likely = item_log_probs(engine, evalset.pool_user, evalset.pool_day, np.arange(n + 1) * POOL, items)[0]
    return {
        "likely": likely.reshape(n, POOL),
        "verdict": candidate_logits(engine, pool_candidates(evalset)).reshape(n, POOL),
        "taste": taste.reshape(n, POOL),
    }


def list_likeness(lists: np.ndarray) -> dict[str, float]:
    """How alike lists of items int [U, K] are: distinct items, distinct first ones, the share of users that the most
    common first item is first for, and the share of a list that another one has too, mean over pairs of users."""
    users, length = lists.shape
    count, first = np.bincount(lists[lists >= 0]).astype(np.float64), np.bincount(lists[:, 0][lists[:, 0] >= 0])
    return {
        "distinct": float((count > 0).sum()),
        "distinct_first": float((first > 0).sum()),
        "commonest_first": float(first.max() / users),
        "overlap": float((count * (count - 1)).sum() / (users * (users - 1) * length)),
    }


def averaged(samples: Mapping[str, Samples]) -> dict[str, Samples]:
    """Samples by row, those of "name#seed" averaged over seeds."""
    members: dict[str, list[Samples]] = {}
    for name, of_name in samples.items():
        members.setdefault(name.partition("#")[0], []).append(of_name)
    return {name: {m: np.mean([part[m] for part in parts], axis=0) for m in METRICS} for name, parts in members.items()}


def _say(what: str) -> None:
    print(f"lists: {what}", file=sys.stderr, flush=True)
