"""``python -m bench.experiments.prior_weight RUN``: is another weight of the community prior better?

A finished run was trained beside the prior with a fixed weight. Here its final weights, and the prior alone, answer
with others: the likelihood of futures in train and valid, and the expected reward on valid, against the run's own
weight under the same resamples of users. ``learned`` is the weight that the train futures' likelihood chooses: what
gradient descent on the weight alone would end at.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.command import Experiment
from bench.machine import write_result
from negfast.data.split import Requests
from negfast.evaluate.bootstrap import interval, ratio, resample_users, weighted_sums
from negfast.evaluate.metrics import Samples
from negfast.evaluate.sets import evaluation_set
from negfast.runtime.engine import Engine
from negfast.runtime.run_folder import RunFolder
from negfast.train.expected import expected_rewards, reward_table
from negfast.train.validation import future_log_probs

RESULT = Path(__file__).parents[1] / "results" / "prior_weight.json"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)
TRAIN_REQUESTS = 1000


@click.command(cls=Experiment)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--resamples", default=1000, show_default=True)
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(run: Path, resamples: int, out: Path) -> None:
    """Measures a finished run on train and valid."""
    engine = RunFolder(run).finished_engine(None)
    own, scale = engine.config.prior.weight, engine.policy.block.scale.item()
    valid = evaluation_set(engine.log, engine.split, "valid").requests
    train, rewards = some_train(engine), reward_table(engine, valid)

    def figures(weight: float, scale: float) -> Samples:
        """nll of train and of valid futures and expected reward on valid, under the resamples of each split's users."""
        changed = with_weight(engine, weight, scale)
        return {
            "nll of train futures": means(train, nll(changed, train), resamples),
            "nll of valid futures": means(valid, nll(changed, valid), resamples),
            "mean reward": means(valid, expected_rewards(changed, valid, rewards), resamples),
        }

    result: dict[str, Any] = {"split": "valid", "trained_with": own}
    for name in ("prior", "model"):
        found = {
            weight: figures(weight, scale if name == "model" else 0.0)
            for weight in sorted({*WEIGHTS, own})
            if weight or name == "model"  # neither prior nor policy: nothing
        }
        result[name] = [row(weight, drawn, found[own]) for weight, drawn in found.items()]
        best = min(result[name], key=lambda entry: entry["nll of train futures"]["mean"])
        result[f"{name} learned"] = best["weight"]
        for entry in result[name]:
            shown = "  ".join(f"{metric} {value['mean']:+.5f}" for metric, value in entry["minus_own"].items())
            print(f"{name} weight {entry['weight']:<5} {shown}", flush=True)
    write_result(out, result)


def some_train(engine: Engine) -> Requests:
    """`TRAIN_REQUESTS` of the train requests with a future."""
    drawn = np.random.default_rng(0).permutation(np.flatnonzero(engine.train_requests.has_dislikes))[:TRAIN_REQUESTS]
    return engine.train_requests.take(np.sort(drawn))


def with_weight(engine: Engine, weight: float, scale: float) -> Engine:
    """The engine with another weight of the prior and another scale of the policy's code logits."""
    engine.policy.block.scale.fill_(scale)
    return replace(engine, chooser=replace(engine.chooser, prior_weight=weight, compact={}))


def nll(engine: Engine, requests: Requests) -> np.ndarray:
    """Mean negative log-likelihood of each request's F, which is not empty, float64 [R]."""
    starts, counts = requests.dislike_offsets[:-1], np.diff(requests.dislike_offsets)
    return -np.add.reduceat(future_log_probs(engine, requests), starts) / counts


def means(requests: Requests, values: np.ndarray, resamples: int) -> np.ndarray:
    """The mean over requests, of each resample of users."""
    users, of_request = np.unique(requests.user, return_inverse=True)
    sums = weighted_sums(resample_users(len(users), resamples, 0), of_request, np.stack([values, values**0], axis=1))
    return ratio(sums[:, 0], sums[:, 1])


def row(weight: float, drawn: Samples, own: Samples) -> dict[str, Any]:
    minus = {metric: interval(values - own[metric]) for metric, values in drawn.items()}
    return {"weight": weight, **{metric: interval(values) for metric, values in drawn.items()}, "minus_own": minus}


if __name__ == "__main__":
    main()
