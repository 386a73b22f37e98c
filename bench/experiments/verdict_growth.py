"""``python -m bench.experiments.verdict_growth``: what more days to learn from bring the verdict's prior.

The final refit gave the verdict nothing and the boosted ranker something. Here both are fitted to the feedback before
T_valid and one and two months less, and asked about valid; and, as in the final table, to that before T_valid and
T_test, and asked about test, to learn why: nothing is chosen by it. Figures are AUCs of the split's filter events; the
prior answers with the mean of its seeds' logits. No transformer is in them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch

from bench.command import Experiment
from bench.machine import write_result
from negfast.data.dataset import Dataset
from negfast.evaluate.baselines.rates import fit_scorers
from negfast.evaluate.bootstrap import interval, ranked_totals, resample_users
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.model.verdict_prior import VerdictPrior, fit
from negfast.prepare.build import SemanticIdSettings
from negfast.prepare.samples import prepare_movietweetings
from negfast.runtime.engine import history_features
from negfast.runtime.verdict import first_feedback_candidates, verdict_start

RESULT = Path(__file__).parents[1] / "results" / "verdict_growth.json"
MONTH = 31  # days
SEEDS = (0, 1, 2)


@click.command(cls=Experiment)
@click.option("--data", type=click.Path(path_type=Path), help="Prepared data set; the built-in MovieTweetings else.")
@click.option("--resamples", default=1000, show_default=True)
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(data: Path | None, resamples: int, out: Path) -> None:
    """Fits and asks both."""
    with TemporaryDirectory() as folder:
        if data is None:  # semantic IDs play no part
            prepare_movietweetings(Path(folder) / "data", semantic_ids=SemanticIdSettings("random", "tfidf"))
        dataset = Dataset.open(data or Path(folder) / "data")
        rows = [row for name in ("valid", "test") for row in growth(dataset, name, resamples)]
    for row in rows:
        print(row, flush=True)
    write_result(out, {"seeds": list(SEEDS), "rows": rows})


def growth(dataset: Dataset, split: str, resamples: int) -> list[dict[str, Any]]:
    """A row for each end of what is learned from; each figure also minus that of the end before it."""
    evalset = evaluation_set(dataset.log, dataset.split(), split)
    last = dataset.valid_day
    ends = (last - 2 * MONTH, last - MONTH, last) if split == "valid" else (last, dataset.test_day)
    rows: list[dict[str, Any]] = []
    before: dict[str, np.ndarray] = {}
    for end in ends:
        scores, events, by_seed = fitted_scores(dataset, evalset, end)
        found = {name: auc_samples(evalset, score, resamples) for name, score in scores.items()}
        row: dict[str, Any] = {"split": split, "learned_until_days_before_T_valid": last - end, "events": events}
        row |= {name: interval(values) for name, values in found.items()}
        row["by_seed"] = [float(auc_samples(evalset, score, 0)[0]) for score in by_seed]
        row["minus_before"] = {name: interval(values - before[name]) for name, values in found.items() if before}
        rows.append(row)
        before = found
    return rows


def fitted_scores(dataset: Dataset, evalset: EvalSet, end: int) -> tuple[dict[str, np.ndarray], int, list[np.ndarray]]:
    """Logits of the filter events, float64 [E], by name; the feedback events of the prior's fit; its logits by seed."""
    log = dataset.log
    asked = (evalset.filter_user, evalset.filter_item, evalset.filter_day)
    features = history_features(dataset, end)
    candidates, labels = first_feedback_candidates(log, verdict_start(log, end), end)
    owner = candidates.group_of_item
    seen = features.rich(candidates.user[owner], candidates.items, candidates.day[owner])
    wanted = torch.from_numpy(features.rich(*asked)).float()
    by_seed = []
    for seed in SEEDS:
        prior = VerdictPrior(features.width)
        fit(prior, seen, labels, seed)
        by_seed.append(prior(wanted).double().numpy())
    net = np.mean(by_seed, axis=0)
    share = fit_scorers(log, dataset.items, end)["boosted-plus"](*asked)
    trees = np.log(share) - np.log1p(-share)
    return {"verdict's prior": net, "boosted-plus": trees, "mean of both": (net + trees) / 2}, len(labels), by_seed


def auc_samples(evalset: EvalSet, score: np.ndarray, resamples: int) -> np.ndarray:
    """The AUC and that under each resample of users, float64 [1 + resamples]."""
    users, user = np.unique(evalset.filter_user, return_inverse=True)
    weights = resample_users(len(users), resamples, 0)
    return ranked_totals(weights, user, score, evalset.filter_dislike, 0.1).auc


if __name__ == "__main__":
    main()
