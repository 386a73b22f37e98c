"""Does a model trained on the window find true dislikes better than one trained on the next negative alone, and better
than one trained on as many negatives drawn from all later ones?"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.simulate import FIRST_DAY, Simulation, write_simulation
from negfast.data.log import DISLIKE, EventLog
from negfast.data.split import Requests, Split, only_next
from negfast.errors import InputError
from negfast.evaluate.bootstrap import interval, ratio, resample_users, weighted_sums
from negfast.files import atomic_file
from negfast.prepare.build import SemanticIdSettings, SplitSettings, prepare
from negfast.prepare.events import EventMapping, ItemMapping
from negfast.prepare.rules import parse_rule
from negfast.runtime.checkpoint import load_weights
from negfast.runtime.engine import Engine
from negfast.runtime.generation import generate
from negfast.runtime.verdict import candidate_logits, group_candidates
from negfast.train.journal import Journal
from negfast.train.loop import run_stage
from negfast.train.run import open_stage
from negfast.train.sft import SftStage

TARGETS = ("window", "next", "later")
REQUESTS, TOP, CANDIDATES = 800, 20, 50
TOP_SHARE = 0.05  # of the unseen items: the user's top true dislikes


def recovery(simulation: Simulation, runs: Path, preset: str, steps: int, seeds: list[int]) -> dict[str, Any]:
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
            correlation = truth.rank_correlation(
                candidate_logits(
                    engine,
                    group_candidates(
                        np.repeat(requests.user, CANDIDATES),
                        np.repeat(requests.day + 1, CANDIDATES),
                        truth.candidates.ravel(),
                    ),
                )
            )
            values.setdefault(f"{target}/verdict_rank_correlation", []).append(correlation)
    assert requests is not None
    return {"preset": preset, "steps": steps, "seeds": seeds, "requests": len(requests), **intervals(requests, values)}


def fitted(target: str, seed: int, steps: int, data: Path, out: Path, preset: str) -> Engine:
    """An engine after ``steps`` of SFT on one of ``TARGETS``, alike in all else; its weights are kept in ``out``.

    Nothing is chosen on valid, whose futures are windows: the last weights count, at the full scale of code logits.
    """
    settings = (f"train.seed={seed}", "align.steps=0", f"sft.steps={steps}")
    run, engine, _ = open_stage("sft", None, preset, data, None, None, out, settings)
    kept = run.checkpoints / "sft"
    if not kept.is_dir():
        stage, journal = SftStage(engine), Journal(run.path, {"sft": steps}, None)
        stage.next_items.requests = aimed(engine.log, engine.split, target, stage.next_items.requests, seed)
        run_stage(stage, 1, engine.policy, run.path, engine.config.train, journal, None, None, 0)
    load_weights(kept, engine.policy)
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
            log / "events.parquet",
            log / "items.csv",
            data,
            mapping=EventMapping(dislike=(parse_rule("feedback==dislike"),), like=(parse_rule("feedback==like"),)),
            item_mapping=ItemMapping(text="title", attributes=(("topic", ""),)),
            split=SplitSettings(),
            semantic_ids=SemanticIdSettings(encoder="tfidf", codebook=64),
        )
    return data


def intervals(requests: Requests, values: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Means over seeds and requests, and the window minus each other target."""
    users, owner = np.unique(requests.user, return_inverse=True)
    weights = resample_users(len(users), 1000, 0)
    samples = {}
    for name, columns in values.items():
        value = np.mean(columns, axis=0)
        sums = weighted_sums(weights, owner, np.stack([value, np.ones(len(value))], axis=1))
        samples[name] = ratio(sums[:, 0], sums[:, 1])
    metrics = [name.partition("/")[2] for name in samples if name.startswith("window/")]
    differences = {
        f"window-{other}/{m}": interval(samples[f"window/{m}"] - samples[f"{other}/{m}"])
        for other in TARGETS[1:]
        for m in metrics
    }
    return {name: interval(sample) for name, sample in samples.items()} | differences
