"""``python -m bench.experiments.sharpness RUN...``: is GRPO's reward more than a sharper policy's?

Expected reward rises when a policy merely trusts itself more, whatever it knows. So the community prior and SFT's
weights (those of ``--long`` runs too) are sharpened here until their answers have the entropy of GRPO's: all logits,
the prior's with them, are divided by the temperature at which they do. Entropies are those of the policy's answers to
valid's requests, estimated from sampled walks with the exact entropy of every choice on the way; expected rewards and
likelihoods are exact. Rows are means over the runs, a seed each; differences are paired over users.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.optimize import brentq

from bench.command import Experiment
from bench.experiments.prior_weight import means, nll, with_weight
from bench.machine import write_result
from negfast.data.split import Requests
from negfast.evaluate.bootstrap import interval
from negfast.evaluate.metrics import Samples
from negfast.evaluate.sets import evaluation_set
from negfast.model.prompts import MIXED
from negfast.runtime.checkpoint import load_weights
from negfast.runtime.engine import Engine
from negfast.runtime.run_folder import RunFolder
from negfast.sid.prior import NEXT_DISLIKE
from negfast.train.expected import expected_rewards, reward_table
from negfast.train.grpo.rollout import rollout

RESULT = Path(__file__).parents[1] / "results" / "sharpness.json"
WALKS = 16  # a request
NEAR = 0.005  # nats: entropies this close are equal


@click.command(cls=Experiment)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--long", "longer", multiple=True, type=click.Path(path_type=Path), help="sft-long run of each RUN.")
@click.option("--resamples", default=1000, show_default=True)
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(runs: tuple[Path, ...], longer: tuple[Path, ...], resamples: int, out: Path) -> None:
    """Measures finished runs on valid."""
    if longer and len(longer) != len(runs):
        raise click.UsageError(f"--long: found {len(longer)} runs, expected one for each of the {len(runs)} runs")
    found: dict[str, list[tuple[float, float, Samples]]] = {}  # by row, a run each: temperature, entropy, figures
    for number, run in enumerate(runs):
        rivals = {"prior": (run, "sft"), "sft": (run, "sft")}
        if longer:
            rivals["sft-long"] = (longer[number], "sft")
        grpo = Measured(run, "grpo", resamples)
        target = grpo.entropy(1.0)
        found.setdefault("grpo", []).append((1.0, target, grpo.figures(1.0)))
        for name, (folder, stage) in rivals.items():
            rival = Measured(folder, stage, resamples, alone=name == "prior")
            found.setdefault(name, []).append((1.0, rival.entropy(1.0), rival.figures(1.0)))
            temperature = matched(rival.entropy, target)
            entropy = rival.entropy(temperature)
            found.setdefault(f"{name}, sharpened", []).append((temperature, entropy, rival.figures(temperature)))
    result = {"split": "valid", "runs": len(runs), "rows": [row(name, entries) for name, entries in found.items()]}
    final = mean_samples(found["grpo"])
    result["differences"] = [
        {"a": "grpo", "b": name, "metric": metric, **interval(final[metric] - values)}
        for name, entries in found.items()
        if name != "grpo"
        for metric, values in mean_samples(entries).items()
    ]
    for entry in result["rows"]:
        print(entry, flush=True)
    write_result(out, result)


class Measured:
    """A stage's policy of a finished run, or the community prior ``alone``, at any temperature."""

    def __init__(self, run: Path, stage: str, resamples: int, alone: bool = False) -> None:
        folder = RunFolder(run)
        self.engine = folder.finished_engine(None)
        load_weights(folder.weights(stage), self.engine.policy)
        self.resamples = resamples
        self.scale = 0.0 if alone else self.engine.policy.block.scale.item()
        self.valid = evaluation_set(self.engine.log, self.engine.split, "valid").requests
        self.rewards = reward_table(self.engine, self.valid)

    def at(self, temperature: float) -> Engine:
        weight = self.engine.config.prior.weight
        return with_weight(self.engine, weight / temperature, self.scale / temperature)

    def entropy(self, temperature: float) -> float:
        return mean_entropy(self.at(temperature), self.valid)

    def figures(self, temperature: float) -> Samples:
        """Negative log-likelihood of valid's futures and expected reward, under the resamples of its users."""
        engine = self.at(temperature)
        return {
            "nll": means(self.valid, nll(engine, self.valid), self.resamples),
            "mean_reward": means(self.valid, expected_rewards(engine, self.valid, self.rewards), self.resamples),
        }


@torch.no_grad()
def mean_entropy(engine: Engine, requests: Requests) -> float:
    """Nats of one item drawn from the policy, the mean over requests, from `WALKS` sampled walks down the trie."""
    total, size = 0.0, engine.config.eval.batch
    for start in range(0, len(requests), size):
        rows = np.arange(start, min(start + size, len(requests)))
        batch = engine.prompts.build(requests.user[rows], requests.day[rows], MIXED, WALKS, tail="next-dislike")
        ids = torch.as_tensor(rows, device=engine.device)
        walks = rollout(engine.policy, engine.chooser, batch, ids, NEXT_DISLIKE, WALKS, seed=0, step=0)
        log_p = walks.choice.log_probs()
        of_choice = -(log_p.exp() * log_p.where(walks.choice.valid, 0.0)).sum(-1)
        total += float((of_choice[walks.tokens.row] * walks.tokens.counted).double().sum())
    return total / (len(requests) * WALKS)


def matched(entropy: Callable[[float], float], target: float) -> float:
    """The temperature in [1/8, 2] at which ``entropy`` is ``target``, to within `NEAR` nats.

    Above that a walk goes to rare codes as often as to common ones, and the entropy over items falls again. ValueError
    where no temperature does.
    """

    def excess(log_temperature: float) -> float:
        found = entropy(float(np.exp(log_temperature))) - target
        return 0.0 if abs(found) < NEAR else found

    at_one = excess(0.0)
    if at_one == 0.0:
        return 1.0
    return float(np.exp(brentq(excess, 0.0, np.log(0.125 if at_one > 0 else 2.0))))


def mean_samples(entries: Sequence[tuple[float, float, Samples]]) -> Samples:
    return {metric: np.mean([figures[metric] for *_, figures in entries], axis=0) for metric in entries[0][-1]}


def row(name: str, entries: Sequence[tuple[float, float, Samples]]) -> dict[str, Any]:
    temperatures, entropies = (float(np.mean(values)) for values in list(zip(*entries, strict=True))[:2])
    figures = {metric: interval(values) for metric, values in mean_samples(entries).items()}
    return {"name": name, "temperature": temperatures, "entropy": entropies, **figures}


if __name__ == "__main__":
    main()
