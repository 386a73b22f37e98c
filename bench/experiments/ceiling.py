"""``python -m bench.experiments.ceiling --data DIR``: how well could any ranker filter this log?

Three estimates, none of which is a bound that cannot be broken (negfast's choice):

- **Oracles** that are shown four fifths of the split's own labels, the future's included, and rank the last fifth,
  fold by fold: the boosted ranker trained on them too, so that nothing has drifted; and a ridge-penalised logistic
  model with an effect for every user and item (and every user-genre pair) beside the boosted score.
- **Infinite histories**: a liability model. Feedback is a dislike where user + item + rest, normal with shares of the
  variance, exceeds a threshold; the shares are the tetrachoric correlations of two events of one user, of one item, and
  of one user within an attribute value. From them the AUC of a ranker that knows user and item exactly, and of one that
  knows them as well as the histories that the events do have allow.
- **Noise of the ratings themselves**: the same model, ranked by the true liability when the same person asked again
  would repeat it with correlation .8, .9 (people re-rating films agree at about .83: Hill et al., CHI 1995).
"""

from pathlib import Path

import click
import numpy as np
from scipy import sparse
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from bench.command import Experiment
from bench.machine import write_result
from negfast.data.dataset import Dataset
from negfast.data.features import HistoryFeatures
from negfast.data.log import DISLIKE
from negfast.data.split import first_feedback
from negfast.evaluate.baselines.rates import BOOSTED_PLUS, fit_scorers
from negfast.evaluate.bootstrap import interval
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.evaluate.table import metric_samples, paired_differences

RESULT = Path(__file__).parents[1] / "results" / "ceiling.json"
FOLDS = 5
PENALTIES = (0.05, 0.1, 0.2)  # C of the effects; the oracle takes the best, which flatters it
METRICS = ("filter_auc", "filter_reduction")
DRAWS = 20


@click.command(cls=Experiment)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Prepared data set.")
@click.option("--split", default="test", type=click.Choice(["valid", "test"]), show_default=True)
@click.option("--resamples", default=1000, show_default=True)
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(data: Path, split: str, resamples: int, out: Path) -> None:
    """Writes the estimates and prints them."""
    dataset = Dataset.open(data)
    evalset = evaluation_set(dataset.log, dataset.split(), split)
    scores = oracle_scores(dataset, evalset)
    predictions = {name: Predictions(filter_score=score) for name, score in scores.items()}
    samples = metric_samples(evalset, predictions, resamples=resamples)
    rows = [{"name": name, **{m: interval(samples[name][m]) for m in METRICS}} for name in scores]
    first, *others = scores
    result = {
        "split": split,
        "folds": FOLDS,
        "oracles": rows,
        "differences": paired_differences(samples, [(name, first) for name in others], METRICS),
        "liability": liability_model(dataset, evalset),
    }
    for row in rows:
        figures = "  ".join(f"{m} {row[m]['mean']:.4f} [{row[m]['low']:.4f}, {row[m]['high']:.4f}]" for m in METRICS)
        print(f"{row['name']:<42} {figures}")
    for name, value in result["liability"].items():
        print(f"{name:<42} {value:.4f}")
    write_result(out, result)


def oracle_scores(dataset: Dataset, evalset: EvalSet) -> dict[str, np.ndarray]:
    """Out-of-fold scores of the split's filter events, float64 [E], after the honest ranker's."""
    log = dataset.log
    asked = (evalset.filter_user, evalset.filter_item, evalset.filter_day)
    labels = evalset.filter_dislike
    start = int(evalset.filter_day.min())
    frozen = fit_scorers(log, dataset.items, dataset.valid_day)["boosted-plus"](*asked)
    scores = {"boosted-plus, fitted before T_valid": frozen}
    refit = fit_scorers(log, dataset.items, start)["boosted-plus"](*asked)
    if start > dataset.valid_day:
        scores[f"boosted-plus, fitted before {evalset.name}"] = refit

    folds = np.random.default_rng(0).integers(0, FOLDS, len(labels))
    drifted = _boosted_on_both(dataset, evalset, start, folds)
    scores["oracle: boosted-plus on the split too"] = drifted
    user, item = (_indicators(column) for column in asked[:2])
    effects = {"users and items": [user, item]}
    pairs = _attribute_pairs(dataset, evalset)
    if pairs is not None:
        effects["users, items, users' genres"] = [user, item, pairs]
    for name, columns in effects.items():
        scores[f"oracle: effects of {name}"] = _with_effects(drifted, sparse.hstack(columns).tocsr(), labels, folds)
    return scores


def _boosted_on_both(dataset: Dataset, evalset: EvalSet, start: int, folds: np.ndarray) -> np.ndarray:
    """The boosted ranker trained on the events before the split and four fifths of the split's."""
    log = dataset.log
    events = first_feedback(log)
    events = events[log.day[events] < start]
    dislike = log.feedback[events] == DISLIKE
    value = np.zeros(0) if log.value is None else log.value[events]
    known = value[np.isfinite(value)]
    features = HistoryFeatures(log, dataset.items, float(dislike.mean()), float(known.mean()) if len(known) else 0.0)
    warm = log.day[events] - log.day.min() >= min(40, int(0.4 * (start - log.day.min())))
    events, dislike = events[warm], dislike[warm]
    before = features.rich(log.user[events], log.item[events], log.day[events])
    within = features.rich(evalset.filter_user, evalset.filter_item, evalset.filter_day)
    out = np.empty(len(folds))
    for fold in range(FOLDS):
        shown = folds != fold
        model = HistGradientBoostingClassifier(**BOOSTED_PLUS, early_stopping=False, random_state=0)
        model.fit(np.concatenate([before, within[shown]]), np.append(dislike, evalset.filter_dislike[shown]))
        out[~shown] = model.predict_proba(within[~shown])[:, 1]
    return out


def _with_effects(score: np.ndarray, effects: sparse.csr_matrix, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Out-of-fold scores with an effect for each column, at the penalty of the best out-of-fold AUC."""
    logit = np.log(score) - np.log1p(-score)
    columns = sparse.hstack([sparse.csr_matrix(10 * logit[:, None]), effects]).tocsr()  # the score is barely penalised
    tried = []
    for penalty in PENALTIES:
        out = np.empty(len(labels))
        for fold in range(FOLDS):
            shown = folds != fold
            model = LogisticRegression(C=penalty, max_iter=300).fit(columns[shown], labels[shown])
            out[~shown] = model.decision_function(columns[~shown])
        tried.append(out)
    return max(tried, key=lambda out: roc_auc_score(labels, out))


def _indicators(values: np.ndarray) -> sparse.csr_matrix:
    names, column = np.unique(values, return_inverse=True)
    return sparse.csr_matrix((np.ones(len(values)), (np.arange(len(values)), column)), (len(values), len(names)))


def _attribute_pairs(dataset: Dataset, evalset: EvalSet) -> sparse.csr_matrix | None:
    """Indicators of (user, value) of the items' first attribute; None without one."""
    row, value, n_values = _values_of(dataset, evalset.filter_item)
    if n_values == 0:
        return None
    keys, column = np.unique(evalset.filter_user[row].astype(np.int64) * n_values + value, return_inverse=True)
    return sparse.csr_matrix((np.ones(len(row)), (row, column)), (len(evalset.filter_item), len(keys)))


def _values_of(dataset: Dataset, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(row, value) for every value of every item asked, of the items' first attribute."""
    values = next(iter(dataset.items.attributes.values()), None)
    if values is None:
        return np.zeros(0, int), np.zeros(0, int), 0
    names = {name: place for place, name in enumerate(sorted({name for of_item in values for name in of_item}))}
    asked = [values[item] for item in items.tolist()]
    row = np.repeat(np.arange(len(items)), [len(of_item) for of_item in asked])
    return row, np.array([names[name] for of_item in asked for name in of_item], dtype=np.int64), len(names)


def liability_model(dataset: Dataset, evalset: EvalSet) -> dict[str, float]:
    """Shares of the liability's variance, and AUCs of rankers that know parts of it."""
    log = dataset.log
    events = first_feedback(log)
    user, item, day, dislike = log.user[events], log.item[events], log.day[events], log.feedback[events] == DISLIKE
    row, value, n_values = _values_of(dataset, item)
    of_user, of_item = tetrachoric(user, dislike), tetrachoric(item, dislike)
    within = tetrachoric(user[row].astype(np.int64) * n_values + value, dislike[row]) if n_values else of_user
    of_taste = max(within - of_user, 0.0)  # what a user's events within a genre share beyond what all of them do
    history = [
        _before(key, day, asked, evalset.filter_day)
        for key, asked in ((user, evalset.filter_user), (item, evalset.filter_item))
    ]
    rate = float(evalset.filter_dislike.mean())
    shares = {"share of users": of_user, "share of items": of_item, "share of users' genres": of_taste}
    estimated = [share * count * share / (count * share + 1 - share)
                 for share, count in zip((of_user, of_item), history, strict=True)]  # fmt: skip
    everything = of_user + of_item + of_taste
    return shares | {
        "AUC, user and item as histories tell": liability_auc(sum(estimated), rate),
        "AUC, user and item known": liability_auc(np.full(len(history[0]), of_user + of_item), rate),
        "AUC, user, item and genre taste known": liability_auc(np.full(len(history[0]), everything), rate),
        **{f"AUC, answers repeat at {r}": liability_auc(np.full(len(history[0]), r), rate) for r in (0.8, 0.9)},
    }


def tetrachoric(key: np.ndarray, dislike: np.ndarray) -> float:
    """The correlation of the liabilities of two events of one ``key``; every event counts once."""
    _, group = np.unique(key, return_inverse=True)
    count, bad = np.bincount(group), np.bincount(group, dislike)
    several = count > 1
    count, bad = count[several], bad[several]
    both, rate = (bad * (bad - 1) / (count - 1)).sum() / count.sum(), bad.sum() / count.sum()
    threshold = norm.ppf(rate)

    def excess(correlation: float) -> float:
        covariance = [[1, correlation], [correlation, 1]]
        return float(multivariate_normal.cdf([threshold, threshold], cov=covariance)) - both

    return float(brentq(excess, 0.0, 0.99)) if excess(0.0) < 0 else 0.0


def liability_auc(known: np.ndarray, rate: float) -> float:
    """AUC of ranking by the known part of each event's liability, ``known`` [E] its share of the variance."""
    rng = np.random.default_rng(0)
    aucs = []
    for _ in range(DRAWS):
        part = rng.normal(size=len(known)) * np.sqrt(known)
        liability = part + rng.normal(size=len(known)) * np.sqrt(1 - known)
        aucs.append(roc_auc_score(liability > norm.isf(rate), part))
    return float(np.mean(aucs))


def _before(key: np.ndarray, day: np.ndarray, asked: np.ndarray, asked_day: np.ndarray) -> np.ndarray:
    """Events of each asked key before the asked day, float64."""
    span = int(max(day.max(), asked_day.max())) + 2
    keys = np.sort(key.astype(np.int64) * span + day)
    first = np.searchsorted(keys, asked.astype(np.int64) * span)
    return (np.searchsorted(keys, asked.astype(np.int64) * span + asked_day) - first).astype(np.float64)


if __name__ == "__main__":
    main()
