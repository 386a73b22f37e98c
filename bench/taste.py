"""``python -m bench taste --data DIR``: what a language model adds to evidence and trees, on one prepared data set.

Arms score the same first likes and dislikes of valid and test, each before its moment: two boosted rankers, of which
the second, with all features, is the rival; the verdict; with ``--model`` a local language model that reads likes and
dislikes in words (`bench.language`). Each stands alone and stacked with the rival, by a logistic regression on both
logits that is fitted on valid. The language model is also asked with the history of another user who judged the same
item, and without any. Figures are means over seeds of training, all under the same resamples of test users: paired 95 %
intervals. Negfast's own decoder was an arm until commit 5bf0b4b; docs/results.md has what it added.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from bench.command import numbers
from bench.language import Reader, Window, asked_logits, draw_windows, fine_tuned, questions
from bench.machine import device_name, versions, write_result
from negfast.data.dataset import Dataset
from negfast.data.log import DISLIKE, EventLog
from negfast.errors import InputError
from negfast.evaluate.baselines.rates import fit_scorers
from negfast.evaluate.bootstrap import interval, ranked_totals, resample_users
from negfast.files import atomic_file
from negfast.model.verdict import Verdict, fit
from negfast.runtime.engine import history_features
from negfast.runtime.verdict import verdict_examples, verdict_start

RIVAL, VERDICT, LANGUAGE = "boosted-plus", "verdict", "language model"
NONE, SWAPPED = ", no history", ", another's history"

Scores = dict[str, list[np.ndarray]]  # logits of valid and of test
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # users, items, moments


def run(
    out: Path | None = None,
    data: Path | None = None,
    model: Path | None = None,
    runs: Path = Path("runs/taste"),
    context: str = "event",
    seeds: str = "0,1,2",
    model_seeds: str = "0",
    judgements: int = 3000,
    epochs: int = 2,
    layers: int = 6,
    asked: int = 3000,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Puts the arms' rows of one data set, context and number of questions beside those that ``out`` holds.

    About ``asked`` first judgements of test and half as many of valid are drawn, the same for all arms and seeds. The
    language model, which costs most, trains its top ``layers`` for ``epochs`` on windows with ``judgements`` first
    judgements, for ``model_seeds`` of the ``seeds`` alone. What is trained is kept in ``runs`` and not trained again.
    """
    if data is None:
        raise InputError("taste: expected --data DIR, a prepared data set")
    opened, runs = Dataset.open(data), runs / data.name
    log, days = opened.log, (opened.valid_day, opened.test_day, opened.end_day)
    rng = np.random.default_rng(0)
    parts = [
        draw_windows(log, *between, most, rng)
        for between, most in zip(pairwise(days), (asked // 2, asked), strict=True)
    ]
    events = [questions(part) for part in parts]
    chosen = numbers(seeds, "--seeds")
    language: dict[int, Scores] = {}
    told = numbers(model_seeds, "--model-seeds") if model is not None else []
    if model is not None:
        learned = draw_windows(log, verdict_start(log, days[0]), days[0], judgements, rng)
        sizes = f"{judgements}-{epochs}-{layers}-{asked}"
        files = {seed: runs / f"language-{context}-{sizes}-{seed}.safetensors" for seed in told}
        language = language_scores(opened, context, model, learned, parts, epochs, layers, files)
    moments = log.moments(context)
    columns = [(log.user[rows], log.item[rows], moments[rows]) for rows in events]
    features = history_features(opened, days[0], context)
    scorers, _ = fit_scorers(features, days[0])
    of_features = [features.rich(*part) for part in columns]
    boosted = {name: [clipped(scorers[name](part)) for part in of_features] for name in ("boosted", RIVAL)}
    others = [of_another(log.user[rows], log.item[rows], np.random.default_rng(1)) for rows in events]
    candidates, disliked, _ = verdict_examples(log, context, days[0])
    seen = features.rich(candidates.user, candidates.item, candidates.moment)
    scores: list[Scores] = []
    for seed in chosen:
        verdict = Verdict(features.width)
        fit(verdict, seen, disliked, seed)
        with torch.inference_mode():
            logits = [verdict(torch.from_numpy(part)).double().numpy() for part in of_features]
        of_language = language.get(seed, {})
        if of_language:
            of_language |= {LANGUAGE + SWAPPED: swap(of_language[LANGUAGE], others)}
        scores.append(boosted | {VERDICT: logits} | of_language)
    labels = [log.feedback[rows] == DISLIKE for rows in events]
    entry: dict[str, Any] = {
        "data": data.name,
        "context": context,
        "seeds": chosen,
        "valid": len(events[0]),
        "test": len(events[1]),
        "users": len(np.unique(log.user[events[1]])),
        "with_another": float(np.mean(others[1] != np.arange(len(others[1])))),
        **({"judgements": judgements, "epochs": epochs, "layers": layers} if told else {}),
        "rows": compare(scores, labels, log.user[events[1]], resamples),
    }
    kept: list[dict[str, Any]] = json.loads(out.read_text())["entries"] if out is not None and out.exists() else []
    same = ("data", "context", "test")
    kept = [old for old in kept if any(old[key] != entry[key] for key in same)]
    made_by = {"device": device_name(), "versions": versions("negfast", "torch", "transformers", "scikit-learn")}
    result = {**made_by, "entries": [*kept, entry]}
    if out is not None:
        write_result(out, result)
    for row in entry["rows"]:
        print(line(row))
    return result


def clipped(probability: np.ndarray) -> np.ndarray:
    """Logits."""
    return logit(np.clip(probability, 1e-6, 1 - 1e-6))


def of_another(user: np.ndarray, item: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each question one of another user on the same item, itself where there is none; int64 [E]."""
    order = np.lexsort((rng.random(len(item)), item))
    first = np.searchsorted(item[order], item[order])
    last = np.searchsorted(item[order], item[order], side="right") - 1
    place = np.arange(len(item))
    other = np.empty(len(item), np.int64)
    other[order] = order[np.where(place == last, first, place + 1)]
    return np.where(user[other] != user, other, np.arange(len(item)))


def swap(scores: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What was said of the questions ``others``: of the same candidates, by histories of other users."""
    return [score[other] for score, other in zip(scores, others, strict=True)]


def language_scores(
    data: Dataset,
    context: str,
    model: Path,
    learned: Sequence[Window],
    parts: Sequence[Sequence[Window]],
    epochs: int,
    layers: int,
    files: dict[int, Path],
) -> dict[int, Scores]:
    """The language model's logits by seed; each seed's are kept in its file and read from there."""
    reader, log = Reader(model, layers), data.log
    bare = [one_an_item(log, part) for part in parts]
    windows = {"learned": learned, "valid": parts[0], "test": parts[1], "bare valid": bare[0], "bare test": bare[1]}
    packs = {name: reader.packs(log, data.items, context, part) for name, part in windows.items()}
    states: dict[str, list[Tensor]] = {}

    def make(seed: int) -> dict[str, np.ndarray]:
        if not states:
            states.update((name, reader.states(part)) for name, part in packs.items())
        judge = fine_tuned(reader, packs["learned"], states["learned"], epochs, seed)
        return {name: asked_logits(judge, packs[name], states[name]) for name in packs if name != "learned"}

    out: dict[int, Scores] = {}
    for seed, file in files.items():
        found = kept_logits(file, partial(make, seed))
        out[seed] = {LANGUAGE: [found["valid"], found["test"]], LANGUAGE + NONE: []}
        for part, name in zip(parts, ("bare valid", "bare test"), strict=True):
            of_item = np.unique(data.log.item[questions(part)], return_inverse=True)[1]
            out[seed][LANGUAGE + NONE].append(found[name][of_item])
    return out


def kept_logits(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What ``file`` holds; what ``make`` finds, then kept there, where it is not there yet."""
    if not file.exists():
        found = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            save_file(found, temporary)
    return load_file(file)


def one_an_item(log: EventLog, windows: Sequence[Window]) -> list[Window]:
    """A window without history for each item that is asked about, by ascending item."""
    events = questions(windows)
    first = np.unique(log.item[events], return_index=True)[1]
    return [Window(events[place : place + 1], np.ones(1, bool)) for place in first]


def compare(
    scores: Sequence[Scores], labels: Sequence[np.ndarray], user: np.ndarray, resamples: int
) -> list[dict[str, Any]]:
    """A row an arm: AUC on test alone and stacked with the rival, the mean over the seeds that have it, and what both
    have above the rival; stacked also above the stacked verdict."""
    present, column = np.unique(user, return_inverse=True)
    weights = resample_users(len(present), resamples, 0)

    def auc(score: np.ndarray) -> np.ndarray:
        return ranked_totals(weights, column, score, labels[1], 0.1).auc

    rival, rows = auc(scores[0][RIVAL][1]), []
    verdicts = [auc(stacked(of_seed, VERDICT, labels[0])[0]) for of_seed in scores]
    for name in scores[0]:
        having = [(of_seed, verdict) for of_seed, verdict in zip(scores, verdicts, strict=True) if name in of_seed]
        alone = [auc(of_seed[name][1]) for of_seed, _ in having]
        row: dict[str, Any] = {"name": name, "auc": interval(np.mean(alone, axis=0))}
        row["by_seed"] = [float(samples[0]) for samples in alone]
        if name != RIVAL:
            fits = [stacked(of_seed, name, labels[0]) for of_seed, _ in having]
            both = [auc(score) for score, _ in fits]
            row["minus_rival"] = interval(np.mean(alone, axis=0) - rival)
            row["stacked_auc"] = interval(np.mean(both, axis=0))
            row["stacked_minus_rival"] = interval(np.mean(both, axis=0) - rival)
            gains = [samples - verdict for samples, (_, verdict) in zip(both, having, strict=True)]
            row["stacked_minus_verdict"] = interval(np.mean(gains, axis=0))
            row["stacked_minus_rival_by_seed"] = [float(samples[0] - rival[0]) for samples in both]
            row["weights"] = [weight for _, weight in fits]  # of the rival and the arm
        rows.append(row)
    return rows


def stacked(scores: Scores, name: str, label: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Logits of test by the rival and the arm together, weighed on valid; the weights."""
    valid, test = (np.stack([scores[RIVAL][n], scores[name][n]], 1) for n in (0, 1))
    fit = LogisticRegression().fit(valid, label)
    return fit.decision_function(test), fit.coef_[0].tolist()


def line(row: dict[str, Any]) -> str:
    figures = []
    for name in ("auc", "minus_rival", "stacked_minus_rival", "stacked_minus_verdict"):
        if name in row:
            figures.append(f"{row[name]['mean']:+.4f} [{row[name]['low']:+.4f}, {row[name]['high']:+.4f}]")
    return f"{row['name']:<34} " + "  ".join(figures)
