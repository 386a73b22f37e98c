"""``python -m bench.experiments.sharpness --data DATA``: is GRPO more than a sharper SFT?

Expected reward rises when a policy merely trusts itself more. So SFT is sharpened until its completions have the
entropy of GRPO's: all logits, the prior's too, are divided by a temperature. The same is done with SFT that trains for
as long as SFT and GRPO took together. All stages keep their last weights. Expected rewards and likelihoods are exact;
entropies come from sampled completions, with the exact entropy of each choice. Runs are kept, so the command can be
stopped and called again.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.command import Experiment, numbers
from bench.machine import write_result
from bench.runs import equal_compute, trained_stages
from negfast.data.split import Requests
from negfast.errors import InputError
from negfast.evaluate.bootstrap import interval, ratio, resample_users, weighted_sums
from negfast.evaluate.sets import engine_set
from negfast.model.choice import TrieChooser
from negfast.runtime.checkpoint import load_weights
from negfast.runtime.engine import Engine
from negfast.runtime.generation import generate
from negfast.sid.prior import NEXT_DISLIKE
from negfast.train.expected import expected_rewards, item_log_probs, reward_table
from negfast.train.grpo.rollout import rollout

RESULT = Path(__file__).parents[1] / "results" / "sharpness.json"
SHARPENED = ", sharpened"
METRICS = ("FHR@20", "mean_reward", "nll")
TEMPERATURES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # SFT's entropy is interpolated between these
WALKS, WALKED = 16, 128  # completions a request, and requests, that tell an entropy


@click.command(cls=Experiment)
@click.option("--data", required=True, type=click.Path(path_type=Path))
@click.option("--runs", default=Path("runs/sharpness"), type=click.Path(path_type=Path), show_default=True)
@click.option("--set", "overrides", multiple=True, help="A setting of the runs.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--split", default="valid", type=click.Choice(["valid", "test"]), show_default=True)
@click.option("--requests", default=500, show_default=True, help="Primary requests to measure on, at most.")
@click.option("--resamples", default=1000, show_default=True)
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(
    data: Path,
    runs: Path,
    overrides: tuple[str, ...],
    seeds: str,
    split: str,
    requests: int,
    resamples: int,
    out: Path,
) -> None:
    """Trains SFT, GRPO and longer SFT for each seed, measures them at equal entropy and keeps the split's rows in the
    result."""
    rivals = [name + sharp for name in ("sft", "sft, as long") for sharp in ("", SHARPENED)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("grpo", *rivals)}
    long_steps = 0
    for seed in numbers(seeds, "--seeds"):
        settings = ("align.steps=0", *overrides, f"train.seed={seed}")
        run, engine = trained_stages(runs / f"seed-{seed}", data, settings)
        long_steps = long_steps or equal_compute(run)
        longer = (*settings, f"sft.steps={long_steps}", "grpo.steps=0")
        long, _ = trained_stages(runs / f"long-{seed}", data, longer)
        measured = Measured(engine, split, requests)
        found["grpo"].append(measured.figures(run.checkpoints / "grpo", 1.0))
        for name, trained in (("sft", run), ("sft, as long", long)):
            sft = trained.checkpoints / "sft"
            found[name].append(measured.figures(sft, 1.0))
            temperature = measured.temperature(sft, found["grpo"][-1]["entropy"])
            found[name + SHARPENED].append(measured.figures(sft, temperature))
    users, user = np.unique(measured.requests.user, return_inverse=True)
    weights = resample_users(len(users), resamples, 0)
    samples = {name: metric_samples(entries, weights, user) for name, entries in found.items()}
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    results[split] = {
        "data": data.name,
        "settings": list(overrides),
        "long_steps": long_steps,
        "seeds": numbers(seeds, "--seeds"),
        "requests": len(user),
        "users": len(users),
        "rows": [row(name, entries, samples[name]) for name, entries in found.items()],
        "differences": [
            {"a": "grpo", "b": b, "metric": metric, **interval(samples["grpo"][metric] - samples[b][metric])}
            for b in rivals
            for metric in METRICS
        ],
    }
    for line in (*results[split]["rows"], *results[split]["differences"]):
        print(json.dumps(line), flush=True)
    write_result(out, results)


class Measured:
    """What weights do on a split at a temperature."""

    def __init__(self, engine: Engine, split: str, requests: int) -> None:
        """On ``requests`` of the split's primary requests, drawn at random; on all of them where there are fewer."""
        evalset = engine_set(engine, split)
        rows = np.random.default_rng(0).permutation(np.flatnonzero(evalset.primary))[:requests]
        self.engine = engine
        self.walked = evalset.requests.take(np.sort(rows[:WALKED]))
        self.requests = evalset.requests.take(np.sort(rows))
        self.rewards = reward_table(engine, self.requests)

    def at(self, weights: Path, temperature: float) -> Engine:
        """The engine with ``weights``, all of whose logits are divided by ``temperature``."""
        load_weights(weights, self.engine.policy)
        self.engine.policy.block.scale.div_(temperature)
        prior_weight = self.engine.config.prior.weight / temperature
        return replace(self.engine, chooser=TrieChooser(self.engine.chooser.trie, prior_weight))

    def temperature(self, weights: Path, target: float) -> float:
        """At which completions have the entropy ``target``, nats. InputError where they do at none of `TEMPERATURES`.

        Hot walks go to rare codes as often as to common ones, and the entropy over items falls again: the lower
        temperature is meant.
        """
        curve = [entropy(self.at(weights, temperature), self.walked) for temperature in TEMPERATURES]
        rising = int(np.argmax(curve)) + 1
        if not curve[0] <= target <= curve[rising - 1]:
            raise InputError(f"entropy: found {target:.3f} nats, expected {curve[0]:.3f} to {max(curve):.3f}")
        return float(np.interp(target, curve[:rising], TEMPERATURES[:rising]))

    def figures(self, weights: Path, temperature: float) -> dict[str, Any]:
        """The temperature, the entropy in nats, and each of `METRICS` by request, float64 [R]."""
        engine, asked = self.at(weights, temperature), self.requests
        generated = generate(engine, asked, top=20)[0]
        counts = np.diff(asked.dislike_offsets)
        owner = np.repeat(np.arange(len(asked)), counts)
        hits = np.bincount(owner, (generated[owner] == asked.dislikes[:, None]).any(1), len(asked))
        [log_p] = item_log_probs(engine, asked.user, asked.day, asked.dislike_offsets, asked.dislikes)
        return {
            "temperature": temperature,
            "entropy": entropy(engine, self.walked),
            "FHR@20": (hits > 0).astype(np.float64),
            "mean_reward": expected_rewards(engine, asked, self.rewards),
            "nll": np.bincount(owner, -log_p, len(asked)) / counts,
        }


@torch.no_grad()
def entropy(engine: Engine, requests: Requests) -> float:
    """Nats of one completion, the mean over requests, from `WALKS` sampled completions each."""
    histories = engine.histories.build(requests.user, requests.moment)
    ids = torch.arange(len(requests), device=engine.device)
    walks = rollout(engine.policy, engine.chooser, histories, ids, NEXT_DISLIKE, WALKS, seed=0, step=0)
    log_p = walks.choice.log_probs()
    of_choice = -(log_p.exp() * log_p.where(walks.choice.valid, 0.0)).sum(-1)
    total = (of_choice[walks.tokens.row] * walks.tokens.counted).double().sum()
    return float(total) / (len(requests) * WALKS)


def metric_samples(entries: Sequence[dict[str, Any]], weights: np.ndarray, user: np.ndarray) -> dict[str, np.ndarray]:
    """The mean over seeds and requests of each of `METRICS`, under the resamples of users."""
    found = {}
    for metric in METRICS:
        value = np.mean([entry[metric] for entry in entries], axis=0)
        sums = weighted_sums(weights, user, np.stack([value, np.ones(len(value))], axis=1))
        found[metric] = ratio(sums[:, 0], sums[:, 1])
    return found


def row(name: str, entries: Sequence[dict[str, Any]], samples: dict[str, np.ndarray]) -> dict[str, Any]:
    """The line of a policy: means over seeds with intervals, and each seed's mean."""
    means = {key: float(np.mean([entry[key] for entry in entries])) for key in ("temperature", "entropy")}
    by_seed = {metric: [float(np.mean(entry[metric])) for entry in entries] for metric in METRICS}
    return {"name": name, **means, **{metric: interval(samples[metric]) for metric in METRICS}, "by_seed": by_seed}


if __name__ == "__main__":
    main()
