"""What semantic IDs are worth downstream: a short run on each quantizer's, all measured on the same valid requests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.runs import trained
from negfast.evaluate.bootstrap import interval, ratio, resample_users, weighted_sums
from negfast.evaluate.metrics import Samples
from negfast.evaluate.predictions import predict_set
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.evaluate.table import metric_samples, paired_differences
from negfast.runtime.engine import Engine
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.verdict import Calibration
from negfast.train.validation import future_log_probs

METRICS = ("nll", "FHR@20", "filter_auc", "filter_auc/cold", "pool_auc")
UNSCALED = Calibration(1.0, 0.0, 0.5)  # none of the metrics looks at the level of a verdict


def short_run(steps: int, align_steps: int) -> tuple[str, ...]:
    """The default run, but shorter and without GRPO, and a quarter of valid to choose weights on."""
    return (
        f"align.steps={align_steps}",
        f"sft.steps={steps}",
        f"sft.validate_every={max(steps // 2, 1)}",
        "grpo.steps=0",
        "eval.valid_requests=300",
    )


def downstream(
    quantizers: Sequence[str], runs: Path, settings: tuple[str, ...], seeds: Sequence[int], preset: str
) -> dict[str, Any]:
    """A row of ``METRICS`` for each quantizer, and those of every other quantizer minus the first one's.

    ``nll``: nats of an item of F, mean over requests. All figures are means over ``seeds``; their intervals are over
    valid's users, the same resamples for all, and say nothing of how training varies: ``by_seed`` does. Runs lie in
    ``runs``/QUANTIZER-SEED and are found again.
    """
    samples: dict[str, Samples] = {}
    by_seed: dict[str, list[dict[str, float]]] = {}
    for quantizer in quantizers:
        found = []
        for seed in seeds:
            folder = runs / f"{quantizer}-{seed}"
            wanted = (*settings, f"sid.quantizer={quantizer}", f"train.seed={seed}")
            data = RunFolder(runs / f"{quantizer}-{seeds[0]}").data if seed != seeds[0] else None
            engine = trained(folder, None, preset, data, wanted).finished_engine(None)
            found.append(policy_samples(engine, evaluation_set(engine.log, engine.split, "valid")))
        by_seed[quantizer] = [{name: float(one[name][0]) for name in METRICS} for one in found]
        samples[quantizer] = {name: np.mean([one[name] for one in found], axis=0) for name in METRICS}
    return {
        "settings": list(settings),
        "seeds": list(seeds),
        "rows": [
            {
                "quantizer": name,
                **{metric: interval(samples[name][metric]) for metric in METRICS},
                "by_seed": by_seed[name],
            }
            for name in quantizers
        ],
        "differences": paired_differences(samples, [(name, quantizers[0]) for name in quantizers[1:]], METRICS),
    }


def policy_samples(engine: Engine, valid: EvalSet) -> Samples:
    """``METRICS`` of the engine's policy, each float64 [1 + resamples], the figure first."""
    samples = metric_samples(valid, {"run": predict_set(engine, valid, UNSCALED)})["run"]
    return {"nll": nll_samples(valid, future_log_probs(engine, valid.requests)), **samples}


def nll_samples(valid: EvalSet, log_p: np.ndarray) -> np.ndarray:
    """float64 [1 + resamples], under the resamples of `metric_samples`; ``log_p`` of every item of every F."""
    counts = np.diff(valid.requests.dislike_offsets)
    owner = np.repeat(np.arange(len(counts)), counts)
    nll = -np.bincount(owner, weights=log_p / counts[owner], minlength=len(counts))
    users = np.unique(np.concatenate([valid.requests.user, valid.filter_user]))
    weights = resample_users(len(users), 1000, 0)
    of_request = np.searchsorted(users, valid.requests.user)
    sums = weighted_sums(weights, of_request, np.stack([nll, np.ones(len(nll))], axis=1))
    return ratio(sums[:, 0], sums[:, 1])
