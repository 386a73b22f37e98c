"""``python -m bench.experiments.simulator``: filters and training targets where the true dislikes are known.

- Filter: what withholding the worst-scored 10 % does to the true dislike rate; beside the truth, the estimate from
  observed feedback and two that use the known propensities (inverse propensity scores, doubly robust).
- Recovery: whether negfast trained on the dislikes of the next days (window) finds the true dislikes better than
  trained on the next dislike alone, or on as many drawn from all later ones. Trains three models a seed.

Intervals are 95 % bootstrap intervals over users.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.command import Experiment, numbers
from bench.machine import device_name, versions, write_result
from bench.simulate import FIRST_DAY, Simulation, SimulationSettings, exposure_policy, simulate, write_simulation
from negfast.data.features import HistoryFeatures
from negfast.data.log import DISLIKE, EventLog
from negfast.data.split import Requests, Split, only_next
from negfast.errors import InputError
from negfast.evaluate.baselines.rates import fit_scorers
from negfast.evaluate.bootstrap import interval, ranked_totals, ratio, resample_users, weighted_sums
from negfast.evaluate.metrics import FILTER_SHARE
from negfast.files import atomic_file
from negfast.prepare.build import SemanticIdSettings, SplitSettings, prepare
from negfast.prepare.events import EventMapping, ItemMapping
from negfast.prepare.rules import parse_rule
from negfast.runtime.checkpoint import load_weights
from negfast.runtime.engine import Engine
from negfast.runtime.generation import generate
from negfast.runtime.verdict import Candidates, candidate_logits, fit_verdict
from negfast.train.journal import Journal
from negfast.train.loop import run_stage
from negfast.train.run import open_stage
from negfast.train.sft import SftStage
from negfast.train.start import TrainOptions

RESULT = Path(__file__).parents[1] / "results" / "simulator.json"
RESAMPLES = 1000
TOGETHER = 256  # user-days
TARGETS = ("window", "next", "later")
REQUESTS, TOP, CANDIDATES = 800, 20, 50
TOP_SHARE = 0.05  # of the unseen items: the user's top true dislikes

Result = dict[str, Any]


@click.command(cls=Experiment)
@click.option("--users", default=5_000, show_default=True)
@click.option("--items", default=2_000, show_default=True)
@click.option("--days", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--runs", default=Path("runs/simulator"), type=click.Path(path_type=Path), show_default=True)
@click.option("--preset", default="smoke", show_default=True, help="Of the trained runs.")
@click.option("--steps", default=300, show_default=True, help="SFT steps of the trained runs.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the trained runs.")
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(
    users: int, items: int, days: int, seed: int, runs: Path, preset: str, steps: int, seeds: str, out: Path
) -> None:
    """Simulates a log, filters it, trains on it, and writes the result."""
    chosen = numbers(seeds, "--seeds")
    settings = SimulationSettings(users=users, items=items, days=days, seed=seed)
    simulation = simulate(settings)
    result: Result = {"device": device_name(), "versions": versions("negfast", "torch", "scikit-learn")}
    result |= {"settings": asdict(settings), "filter": filter_effects(simulation)}
    result["recovery"] = recovery(simulation, runs, preset, steps, chosen)
    write_result(out, result)
    print(json.dumps(result, indent=1))


def filter_effects(simulation: Simulation, user_days: int = 4_000) -> Result:
    """Relative reductions of the dislike rate by a filter, true and estimated.

    The score is the logistic baseline, fitted on the feedback of the first two thirds of the days. It withholds an
    item where its score is among the highest 10 % of the scores of the impressions of the days before the test days.
    Then either the slot stays empty, or the recommender fills it with an item that it would show and the filter lets
    pass, with probabilities in proportion. Histories are as logged: what the next impression would be, not what a
    year of filtering would make of the log. The estimates see feedback and propensities only; they know how
    often dislikes are reported, which a platform can ask its users.
    """
    log, settings, truth = simulation.log, simulation.settings, simulation.truth
    day, moment = log.day, log.moments("day")
    fit_until, test_from = (FIRST_DAY + settings.days * k // 6 for k in (4, 5))
    features = HistoryFeatures.smoothed(log, simulation.items, fit_until, "day")
    scorers, _ = fit_scorers(features, fit_until)

    def score(*asked: np.ndarray) -> np.ndarray:
        return scorers["logistic"](features.rich(*asked))

    rng = np.random.default_rng(0)
    before = np.flatnonzero((day >= fit_until) & (day < test_from))
    before = np.sort(rng.permutation(before)[:50_000])
    threshold = float(np.quantile(score(log.user[before], log.item[before], moment[before]), 1 - FILTER_SHARE))
    key = log.user.astype(np.int64) * 2**32 + day
    chosen = rng.permutation(np.unique(key[day >= test_from]))[:user_days]
    rows = np.flatnonzero(np.isin(key, chosen))

    everyone = np.arange(log.n_items)
    starts = rows[np.flatnonzero(np.diff(key[rows], prepend=-1))]  # of user-days: a call replays the log
    of_day: Iterator[np.ndarray] = (
        scores
        for part in np.array_split(starts, -(-len(starts) // TOGETHER))
        for scores in score(
            np.repeat(log.user[part], log.n_items), np.tile(everyone, len(part)), np.repeat(moment[part], log.n_items)
        ).reshape(-1, log.n_items)
    )
    columns = np.ones((len(rows), 8))
    last, kept, model = -1, np.zeros(0, dtype=bool), np.zeros(0)
    for place, row in enumerate(rows):
        user, item = int(log.user[row]), int(log.item[row])
        if key[row] != last:
            last = key[row]
            scores = next(of_day)
            kept, model = scores < threshold, true_probability(scores, settings)
            p = truth.dislike_probability(np.full(log.n_items, user), everyone)
        policy = exposure_policy(simulation, user, int(day[row]) - FIRST_DAY, int(row - log.user_offsets[user]))
        passing = float(policy[kept].sum())
        filled = policy * kept / passing if passing > 0 else policy
        reported = float(log.feedback[row] == DISLIKE)
        shown = (reported - settings.false_dislike) / (settings.report_dislike - settings.false_dislike)
        weight = filled[item] / policy[item]
        direct = float(filled @ model)
        columns[place] = (
            policy @ p,  # the true rate as things are
            filled @ p,  # with the filter, slots filled
            (policy * kept) @ p,  # with the filter, slots left empty: dislikes an impression now
            passing,
            shown,  # an unbiased reading of the first column from the feedback
            weight * shown,
            direct + weight * (shown - model[item]),
            1.0,
        )
    observed = log.feedback[rows] > 0
    scored = score(log.user[rows], log.item[rows], moment[rows])
    cut = scored >= threshold
    disliked = log.feedback[rows] == DISLIKE
    totals = np.stack([observed, disliked, observed & ~cut, ~cut & disliked], axis=1).astype(float)
    users, owner = np.unique(log.user[rows], return_inverse=True)
    weights = resample_users(len(users), RESAMPLES, 0)
    sums = weighted_sums(weights, owner, np.concatenate([columns, totals], axis=1))
    now, filled_rate, left, passing_, shown_, ips, robust, impressions = sums[:, :8].T
    observed_, dislikes, kept_observed, kept_dislikes = sums[:, 8:].T
    true_filled = 1 - ratio(filled_rate, now)
    aucs = {
        name: ranked_totals(weights, owner[observed], values[observed], disliked[observed], FILTER_SHARE).auc
        for name, values in (("score", scored), ("truth", truth.dislike_probability(log.user[rows], log.item[rows])))
    }
    estimates = {
        "truth, slots filled": true_filled,
        "truth, slots left empty": 1 - ratio(ratio(left, passing_), ratio(now, impressions)),
        "observed feedback": 1 - ratio(ratio(kept_dislikes, kept_observed), ratio(dislikes, observed_)),
        "IPS, slots filled": 1 - ratio(ips, shown_),
        "doubly robust, slots filled": 1 - ratio(robust, shown_),
    }
    return {
        "impressions": len(rows),
        "users": len(users),
        "true_dislike_rate": float(columns[:, 0].mean()),
        "observed_dislike_rate": float(disliked[observed].mean()),
        "share_withheld": float(1 - columns[:, 3].mean()),
        "observed_auc": {name: interval(auc) for name, auc in aucs.items()},  # the truth's is the ceiling of any score
        "rows": [
            {"name": name, "reduction": interval(values)}
            | ({} if name.startswith("truth") else {"minus_truth_filled": interval(values - true_filled)})
            for name, values in estimates.items()
        ],
    }


def true_probability(score: np.ndarray, settings: SimulationSettings) -> np.ndarray:
    """P(dislike) from P(dislike | reported), by the rates at which dislikes and likes are reported."""
    odds = score / (1 - score) * settings.report_like - settings.false_dislike
    odds = np.maximum(odds, 0) / settings.report_dislike
    return odds / (1 + odds)


def recovery(simulation: Simulation, runs: Path, preset: str, steps: int, seeds: list[int]) -> Result:
    """Trains ``runs``/TARGET-SEED where it is not there, and measures each against the truth.

    On random test requests: the mean true dislike probability of the 20 items generated, the share of them among the
    user's top 5 % true dislikes, and the rank correlation of verdict and true probability over random unseen items.
    The random, the prior's and the best possible list stand beside. Seeds are averaged user by user.
    """
    data = prepared(simulation, runs)
    values: dict[str, list[np.ndarray]] = {}
    requests: Requests | None = None
    for target in TARGETS:
        for seed in seeds:
            engine = fitted(target, seed, steps, data, runs / f"{target}-{seed}", preset)
            test = engine.split.test
            order = np.random.default_rng(0).permutation(len(test))
            truth = Truths(simulation, test.take(np.sort(order[: 2 * REQUESTS])))
            requests = truth.requests
            found = {target: generate(engine, requests, TOP)[0]}
            if not values:
                found["prior"] = generate(engine, requests, TOP, with_policy=False)[0]
                found["random"], found["best"] = truth.random, truth.best
            for name, items in found.items():
                values.setdefault(f"{name}/true_probability", []).append(truth.mean_probability(items))
                values.setdefault(f"{name}/top_dislikes", []).append(truth.top_share(items))
            user, moment = (np.repeat(column, CANDIDATES) for column in (requests.user, requests.moment))
            logits = candidate_logits(engine, Candidates(user, truth.candidates.ravel(), moment))
            correlation = truth.rank_correlation(logits)
            values.setdefault(f"{target}/verdict_rank_correlation", []).append(correlation)
    assert requests is not None
    return {
        "preset": preset,
        "steps": steps,
        "seeds": seeds,
        "requests": len(requests),
        "rows": recovery_rows(requests, values),
    }


def fitted(target: str, seed: int, steps: int, data: Path, out: Path, preset: str) -> Engine:
    """An engine after ``steps`` of SFT on one of ``TARGETS``, alike in all else; its weights are kept in ``out``.

    Nothing is chosen on valid, whose futures are windows: the last weights count, at the full scale of code logits.
    """
    settings = (f"train.seed={seed}", "align.steps=0", f"sft.steps={steps}")
    run, engine, _ = open_stage("sft", TrainOptions(preset=preset, data=data, out=out, overrides=settings))
    kept = run.checkpoints / "sft"
    if not kept.is_dir():
        stage, journal = SftStage(engine), Journal(run.path, {"sft": steps}, None)
        requests = stage.task.requests.take()
        stage.next_items.requests = aimed(engine.log, engine.split, target, requests, seed)
        run_stage(stage, 1, engine.policy, run.path, engine.config.train, journal, None, None, 0)
    load_weights(kept, engine.policy)
    fit_verdict(engine)  # a run does so after its last stage
    engine.policy.eval().requires_grad_(False)
    return engine


def aimed(log: EventLog, split: Split, target: str, requests: Requests, seed: int) -> Requests:
    """Train requests with the F of a target; "later": as many items as the window's, drawn from all dislikes of the
    train days after t."""
    if target == "window":
        return requests
    if target == "next":
        return only_next(log, requests)
    rng, parts = np.random.default_rng(seed), [np.zeros(0, np.int32)]
    for row, size in enumerate(np.diff(requests.dislike_offsets)):
        if size:
            later = later_dislikes(log, int(requests.user[row]), int(requests.day[row]), split.valid_day)
            parts.append(np.sort(rng.choice(later, size, replace=False)))
    return replace(requests, dislikes=np.concatenate(parts))


def later_dislikes(log: EventLog, user: int, day: int, before_day: int | None = None) -> np.ndarray:
    """The items unseen up to the end of ``day`` that the user dislikes later, the first first, int32; without those
    first disliked on ``before_day`` or after, if given."""
    own = slice(log.user_offsets[user], log.user_offsets[user + 1])
    item, feedback, days = log.item[own], log.feedback[own], log.time[own] // 86_400
    in_time = days > day if before_day is None else (days > day) & (days < before_day)
    later = item[in_time & (feedback == DISLIKE)]
    later = later[~np.isin(later, item[days <= day])]
    _, first = np.unique(later, return_index=True)
    return later[np.sort(first)]


class Truths:
    """True probabilities of the unseen, released items of at most `REQUESTS` requests that have enough of them."""

    def __init__(self, simulation: Simulation, requests: Requests) -> None:
        log, truth, rng = simulation.log, simulation.truth, np.random.default_rng(1)
        self.p = truth.dislike_probability(requests.user[:, None], np.arange(log.n_items)[None])
        for row, (user, day) in enumerate(zip(requests.user, requests.day, strict=True)):
            own = slice(log.user_offsets[user], log.user_offsets[user + 1])
            self.p[row, log.item[own][log.day[own] <= day]] = np.nan
            self.p[row, truth.release > day - FIRST_DAY] = np.nan
        enough = np.flatnonzero((~np.isnan(self.p)).sum(1) >= 2 * CANDIDATES)[:REQUESTS]
        self.p, self.requests = self.p[enough], requests.take(enough)
        shuffled = np.argsort(np.where(np.isnan(self.p), 2.0, rng.random(self.p.shape)), axis=1)
        self.candidates = np.sort(shuffled[:, :CANDIDATES], axis=1).astype(np.int32)
        self.random = shuffled[:, :TOP].astype(np.int32)
        self.best = np.argsort(np.where(np.isnan(self.p), 1.0, -self.p), axis=1)[:, :TOP].astype(np.int32)

    def mean_probability(self, items: np.ndarray) -> np.ndarray:
        """float64 [R]; items that nobody can have been shown yet count as disliked by nobody."""
        return np.nan_to_num(np.take_along_axis(self.p, items.astype(np.int64), axis=1)).mean(1)

    def top_share(self, items: np.ndarray) -> np.ndarray:
        least = np.nanquantile(self.p, 1 - TOP_SHARE, axis=1)
        return (np.take_along_axis(self.p, items.astype(np.int64), axis=1) >= least[:, None]).mean(1)

    def rank_correlation(self, score: np.ndarray) -> np.ndarray:
        """Spearman's over each request's candidates, float64 [R]; ``score`` is [R * CANDIDATES]."""
        ranks = [
            np.argsort(np.argsort(x, axis=1), axis=1).astype(float)
            for x in (
                score.reshape(-1, CANDIDATES),
                np.take_along_axis(self.p, self.candidates.astype(np.int64), axis=1),
            )
        ]
        a, b = (r - r.mean(1, keepdims=True) for r in ranks)
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def prepared(simulation: Simulation, runs: Path) -> Path:
    """The simulation as a data set in ``runs``/data. InputError where that is one of other settings."""
    data, log, settings = runs / "data", runs / "log", runs / "simulation.json"
    if not settings.exists():
        runs.mkdir(parents=True, exist_ok=True)
        with atomic_file(settings) as temporary:
            temporary.write_text(json.dumps(asdict(simulation.settings), indent=1) + "\n")
    elif json.loads(settings.read_text()) != asdict(simulation.settings):
        raise InputError(f"{runs}: holds runs on another simulation, see {settings.name}; give another --runs")
    if not log.exists():
        write_simulation(simulation, log)
    if not data.exists():
        prepare(
            [log / "events.parquet"],
            log / "items.csv",
            data,
            mapping=EventMapping(dislike=(parse_rule("feedback==dislike"),), like=(parse_rule("feedback==like"),)),
            item_mapping=ItemMapping(text="title", attributes=(("topic", ""),)),
            split=SplitSettings(),
            semantic_ids=SemanticIdSettings(encoder="tfidf", codebook=64),
        )
    return data


def recovery_rows(requests: Requests, values: dict[str, list[np.ndarray]]) -> list[Result]:
    """Means over seeds and requests, and the window minus each other target."""
    users, owner = np.unique(requests.user, return_inverse=True)
    weights = resample_users(len(users), RESAMPLES, 0)
    samples: dict[str, dict[str, np.ndarray]] = {}
    for key, columns in values.items():
        name, _, metric = key.partition("/")
        value = np.mean(columns, axis=0)
        sums = weighted_sums(weights, owner, np.stack([value, np.ones(len(value))], axis=1))
        samples.setdefault(name, {})[metric] = ratio(sums[:, 0], sums[:, 1])
    for other in TARGETS[1:]:
        window = samples["window"]
        samples[f"window minus {other}"] = {metric: window[metric] - samples[other][metric] for metric in window}
    return [
        {"name": name} | {metric: interval(sample) for metric, sample in found.items()}
        for name, found in samples.items()
    ]


if __name__ == "__main__":
    main()
