"""What the HTML report shows beside the tables: verdicts, filter curves, costs, strata, example users."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from negfast.data.dataset import Dataset
from negfast.data.log import DISLIKE, LIKE, EventLog, history_ends, past_dislikes
from negfast.evaluate.bootstrap import interval
from negfast.evaluate.metrics import Costs, cost_samples, future_hits
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.sets import EvalSet
from negfast.evaluate.table import HEADLINE, known, metric_samples, paired_differences, resampled, shown

PAST_BINS = ((0, 0), (1, 2), (3, 5), (6, 15), (16, None))  # numbers of past dislikes, both ends included
SHARES = np.concatenate([np.arange(1, 21) / 100, np.arange(25, 55, 5) / 100])  # of events filtered
RATIOS = (1, 2, 5, 10)  # what a dislike shown costs, in likes withheld
EXAMPLES, SHOWN = 6, 8  # users shown, and titles in each of their lists


@dataclass(frozen=True)
class Comparison:
    """The model beside the best baseline by one figure; ``difference`` has the interval of their paired difference."""

    model: str  # its row: the verdict's, or that of the run's lists
    baselines: list[str]  # those whose figure, as shown, is the best; the best before rounding first
    difference: Mapping[str, float | None]  # mean, low, high; the model's - that of baselines[0]

    @property
    def words(self) -> str:
        """The verdict: level where the interval holds zero, or there is none."""
        low, high = self.difference["low"], self.difference["high"]
        if low is None or high is None or low <= 0 <= high:
            return "level with"
        return "above" if low > 0 else "below"


@dataclass(frozen=True)
class Savings:
    """What withholding does at the costs: the metrics of `cost_samples` with intervals, by predictor."""

    costs: Costs
    by_name: dict[str, dict[str, dict[str, float | None]]]


@dataclass(frozen=True)
class Tradeoff:
    """What filtering the events of highest score catches: shares of all dislikes and of all likes, one a cut."""

    dislikes_avoided: list[float]
    likes_lost: list[float]


@dataclass(frozen=True)
class Stratum:
    """Users with so many past dislikes: events and requests, AUC (None with one class only) and FHR@20."""

    label: str
    events: int
    filter_auc: float | None
    requests: int
    fhr20: float | None


@dataclass(frozen=True)
class Example:
    """One request: recent history and the generated items, each with what followed ("disliked", "liked" or "")."""

    user: str
    day: int
    liked: list[str]
    disliked: list[str]
    predicted: list[tuple[str, str]]
    future: list[str]


def compare(
    evalset: EvalSet,
    predictions: Mapping[str, Predictions],
    rows: Sequence[Mapping[str, Any]],
    resamples: int,
    seed: int,
) -> dict[str, Comparison]:
    """The last of the model's rows beside the best baseline by each headline figure that both have.

    ``rows`` are those of `evaluate_rows` for the same ``predictions``.
    """
    best: dict[str, tuple[str, list[str]]] = {}
    for metric in HEADLINE:
        own = [row["name"] for row in rows if row["kind"] == "model" and known(row, metric)]
        baselines = [row for row in rows if row["kind"] == "baseline" and known(row, metric)]
        if baselines and own:
            baselines.sort(key=lambda row: -row[metric]["mean"])
            tied = [row["name"] for row in baselines if shown(row, metric) == shown(baselines[0], metric)]
            best[metric] = own[-1], tied
    names = dict.fromkeys(name for model, tied in best.values() for name in (model, tied[0]))
    samples = metric_samples(evalset, {name: predictions[name] for name in names}, None, resamples, seed)
    out = {}
    for metric, (model, tied) in best.items():
        (difference,) = paired_differences(samples, [(model, tied[0])], [metric])
        out[metric] = Comparison(model, tied, {key: difference[key] for key in ("mean", "low", "high")})
    return out


def savings(
    evalset: EvalSet, predictions: Mapping[str, Predictions], names: Sequence[str], resamples: int, seed: int
) -> list[Savings]:
    """At each of ``RATIOS``, for those of ``names`` that give probabilities."""
    weights, _, user = resampled(evalset, resamples, seed)
    out = []
    for ratio in RATIOS:
        costs, by_name = Costs(float(ratio), 1.0), {}
        for name in names:
            score = predictions[name].filter_score
            if score is not None and predictions[name].filter_is_probability:
                samples = cost_samples(evalset, score, costs, weights, user)
                by_name[name] = {metric: interval(values) for metric, values in samples.items()}
        out.append(Savings(costs, by_name))
    return out


def tradeoff(score: np.ndarray, dislike: np.ndarray) -> Tradeoff:
    """At each of ``SHARES``; events of equal score are cut in the order of the set."""
    order = np.argsort(-score, kind="stable")
    bad = np.cumsum(dislike[order])
    cut = np.maximum((SHARES * len(order)).round().astype(int), 1)
    return Tradeoff((bad[cut - 1] / bad[-1]).tolist(), ((cut - bad[cut - 1]) / max(len(order) - bad[-1], 1)).tolist())


def strata(log: EventLog, evalset: EvalSet, score: np.ndarray, generated: np.ndarray) -> list[Stratum]:
    """The filter's ``score`` float64 [E] and the lists ``generated`` int32 [R, TOP], by the number of dislikes that the
    user had before."""
    of_event = past_dislikes(log, evalset.filter_user, evalset.filter_moment)
    requests = evalset.requests
    of_request = past_dislikes(log, requests.user, requests.moment)
    hit = np.asarray(future_hits(requests.dislike_offsets, requests.dislikes, generated[:, :20]).any(1))
    out = []
    for low, high in PAST_BINS:
        label = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        wanted = np.arange(low, (int(of_event.max(initial=0)) if high is None else high) + 1)
        events, rows = (np.flatnonzero(np.isin(count, wanted)) for count in (of_event, of_request))
        labels = evalset.filter_dislike[events]
        auc = float(roc_auc_score(labels, score[events])) if 0 < labels.sum() < len(labels) else None
        fhr = float(hit[rows].mean()) if len(rows) else None
        out.append(Stratum(label, len(events), auc, len(rows), fhr))
    return out


def examples(data: Dataset, evalset: EvalSet, generated: np.ndarray, seed: int) -> list[Example]:
    """A random choice of users with past likes and dislikes, half of them with a hit where there are such.

    ``generated`` is int32 [R, TOP].
    """
    log, requests = data.log, evalset.requests
    top = generated[:, : SHOWN + 2]
    hit = future_hits(requests.dislike_offsets, requests.dislikes, top)
    liked = future_hits(requests.like_offsets, requests.likes, top)
    known = np.flatnonzero(past_dislikes(log, requests.user, requests.moment) >= 3)
    shuffled = np.random.default_rng(seed).permutation(known)
    with_hit = [row for row in shuffled if hit[row].any()][: EXAMPLES // 2]
    others = [row for row in shuffled if not hit[row].any()]
    titles = [text or item for text, item in zip(data.items.text, data.items.ids, strict=True)]
    out = []
    for row in [*with_hit, *others][:EXAMPLES]:
        user, day = int(requests.user[row]), int(requests.day[row])
        start, stop = log.user_offsets[user], history_ends(log, requests.user[[row]], requests.day[[row]])[0]
        judged = [i for i in range(start, stop) if log.feedback[i] in (LIKE, DISLIKE)][::-1]
        history = {
            kind: [titles[log.item[i]] for i in judged if (log.feedback[i] == DISLIKE) == kind] for kind in (0, 1)
        }
        future = requests.dislikes[requests.dislike_offsets[row] : requests.dislike_offsets[row + 1]]
        words = ["disliked" if bad else "liked" if good else "" for bad, good in zip(hit[row], liked[row], strict=True)]
        predicted = [(titles[item], word) for item, word in zip(top[row], words, strict=True) if item >= 0]
        out.append(
            Example(
                data.user_ids[user],
                day,
                history[0][:SHOWN],
                history[1][:SHOWN],
                predicted,
                [titles[item] for item in future[:SHOWN]],
            )
        )
    return out


def tradeoffs(evalset: EvalSet, predictions: Mapping[str, Predictions], names: Sequence[str]) -> dict[str, Tradeoff]:
    """`tradeoff` of every predictor of ``names`` that scores the filter's events."""
    scores = {name: predictions[name].filter_score for name in names if name in predictions}
    return {name: tradeoff(s, evalset.filter_dislike) for name, s in scores.items() if s is not None}
