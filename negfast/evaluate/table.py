"""From predictions to rows, from rows to JSON and to printed tables: one for each question."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from negfast.evaluate.bootstrap import interval, resample_users
from negfast.evaluate.metrics import (
    Costs,
    Samples,
    Similarity,
    cost_samples,
    filter_samples,
    generation_samples,
    pool_samples,
    reliability_curve,
    reward_samples,
)
from negfast.evaluate.predictions import TOP, Predictions
from negfast.evaluate.sets import EvalSet

CONTEXTS = {
    "day": 'context "day": events up to the end of the day before',
    "event": 'context "event": events up to the second before',
}
"""What a predictor has seen when it scores an event of the filter."""


@dataclass(frozen=True)
class Question:
    """One table: a name, what is asked, and its figures, each with a heading and what it says."""

    name: str
    asks: str
    figures: Mapping[str, tuple[str, str]]  # metric -> heading, explanation


FILTER = Question(
    "Filter",
    "every first like or dislike is scored",
    {
        "filter_auc": ("AUC", "chance that a dislike scores above a like"),
        "filter_reduction": ("reduction %", "fall of the dislike rate when exactly the top 10 % is withheld"),
    },
)
MATCHED_POOL = Question(
    "Matched pool",
    "the disliked item is ranked among 99 that others consumed on the same day",
    {
        "pool_hr@10": ("HR@10", "chance that it is among the first 10"),
        "pool_auc": ("AUC", "chance that it scores above one of the others"),
    },
)
GENERATION = Question(
    "Generation",
    "20 items are generated for each user and day, out of all that the user has not seen",
    {
        "FHR@20": ("FHR@20", "share of primary requests with one of them disliked within the horizon"),
        "known_hit_dislike_share@20": (
            "hit share",
            "dislikes among those that the user went on to like or dislike",
        ),
    },
)
QUESTIONS = (FILTER, MATCHED_POOL, GENERATION)
HEADLINE = tuple(metric for question in QUESTIONS for metric in question.figures)
PER_CENT = {"filter_reduction", "withheld_share", "dislikes_avoided_share", "likes_withheld_share"}
COST_FIGURES = {
    "withheld_share": "withheld %",
    "dislikes_avoided_share": "dislikes avoided %",
    "likes_withheld_share": "likes withheld %",
    "saved_per_1000": "saved per 1,000",
}


def evaluate_rows(
    evalset: EvalSet,
    predictions: Mapping[str, Predictions],
    similarity: Similarity | None = None,
    resamples: int = 1000,
    seed: int = 0,
    costs: Costs | None = None,
) -> list[dict[str, Any]]:
    """One row for each predictor: name, kind, and every metric it can have as {"mean", "low", "high"}.

    Intervals are 95 % percentile intervals of a bootstrap over the users of the evaluation set. A metric that is
    undefined (no such request, one class only) has None. Probabilities also give ``filter_reliability`` and, with
    ``costs``, the metrics of `cost_samples`.
    """
    samples = metric_samples(evalset, predictions, similarity, resamples, seed, costs)
    rows = []
    for name, predicted in predictions.items():
        row: dict[str, Any] = {"name": name, "kind": predicted.kind}
        row |= {metric: interval(values) for metric, values in samples[name].items()}
        if predicted.filter_score is not None and predicted.filter_is_probability:
            row["filter_reliability"] = reliability_curve(predicted.filter_score, evalset.filter_dislike)
        row |= {"note": predicted.note} if predicted.note else {}
        rows.append(row)
    return rows


def metric_samples(
    evalset: EvalSet,
    predictions: Mapping[str, Predictions],
    similarity: Similarity | None = None,
    resamples: int = 1000,
    seed: int = 0,
    costs: Costs | None = None,
) -> dict[str, Samples]:
    """Every metric of every predictor under the same resamples of users: float64 [1 + resamples], the figure first."""
    weights, of_request, of_event = resampled(evalset, resamples, seed)
    out: dict[str, Samples] = {}
    for name, predicted in predictions.items():
        _check_shapes(evalset, name, predicted)
        out[name] = {}
        if predicted.generated is not None:
            out[name] |= generation_samples(evalset, predicted.generated, weights, of_request, similarity)
        if predicted.filter_score is not None:
            out[name] |= filter_samples(evalset, predicted, weights, of_event)
            if costs is not None and predicted.filter_is_probability:
                out[name] |= cost_samples(evalset, predicted.filter_score, costs, weights, of_event)
        if predicted.pool_score is not None:
            out[name] |= pool_samples(evalset, predicted.pool_score, weights, of_request[evalset.pool_request])
        if predicted.expected_reward is not None:
            out[name] |= reward_samples(evalset, predicted.expected_reward, weights, of_request)
    return out


def resampled(evalset: EvalSet, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bootstrap weights uint8 [1 + resamples, U] of the set's users, and the column of every request and event."""
    users = np.unique(np.concatenate([evalset.requests.user, evalset.filter_user]))
    of_request, of_event = (np.searchsorted(users, u) for u in (evalset.requests.user, evalset.filter_user))
    return resample_users(len(users), resamples, seed), of_request, of_event


def paired_differences(
    samples: Mapping[str, Samples], pairs: Sequence[tuple[str, str]], metrics: Sequence[str] = HEADLINE
) -> list[dict[str, Any]]:
    """a - b for each pair and each metric that both have, with the interval of the paired differences."""
    return [
        {"a": a, "b": b, "metric": metric, **interval(samples[a][metric] - samples[b][metric])}
        for a, b in pairs
        for metric in metrics
        if metric in samples[a] and metric in samples[b]
    ]


def evaluation(evalset: EvalSet, rows: Sequence[Mapping[str, Any]], costs: Costs | None = None) -> dict[str, Any]:
    """JSON types: the split's sizes, the costs where given, and the rows."""
    given = {} if costs is None else {"costs": asdict(costs) | {"threshold": costs.threshold}}
    return summary(evalset) | given | {"rows": list(rows)}


def summary(evalset: EvalSet) -> dict[str, Any]:
    """Sizes of the evaluation set, and the context of its filter."""
    drawn_from = {} if evalset.drawn_from is None else {"drawn_from": evalset.drawn_from}
    return drawn_from | {
        "split": evalset.name,
        "requests": len(evalset.requests),
        "primary_requests": int(evalset.primary.sum()),
        "users": len(np.unique(evalset.requests.user)),
        "filter_events": len(evalset.filter_user),
        "filter_context": evalset.context,
        "filter_dislike_rate": float(evalset.filter_dislike.mean()),
        "pools": len(evalset.pool_items),
        "pools_redrawn": evalset.pools_redrawn,
        "pools_dropped": evalset.pools_dropped,
        "no_past_dislike_share": float(1 - evalset.past_dislike.mean()),
        "cold_dislike_share": float(evalset.cold_item[evalset.requests.dislikes].mean()),
    }


def print_table(found: Mapping[str, Any], console: Console | None = None) -> None:
    """A table of an `evaluation` for each question, baselines above models, the best of a column bold; in 100 columns.

    With costs one more: what withholding at their threshold saves.
    """
    rows, context = found["rows"], found["filter_context"]
    console = console or Console(width=None if sys.stdout.isatty() else 100)
    console.print(sizes(found), highlight=False)
    if "drawn_from" in found:
        console.print(drawn(found), highlight=False)
    for question in QUESTIONS:
        headings = {metric: heading for metric, (heading, _) in question.figures.items()}
        console.print(f"\n[bold]{question.name}[/bold]: {asks(question, context)}", highlight=False)
        console.print(_grid(rows, headings, headings))
        for heading, says in question.figures.values():
            console.print(f"{heading}: {says}", highlight=False)
    if "costs" in found:
        console.print(f"\n[bold]Costs[/bold]: {cost_rule(found['costs'])}; {CONTEXTS[context]}", highlight=False)
        console.print(_grid(rows, COST_FIGURES, ("saved_per_1000",)))
        console.print("saved per 1,000 events: in the unit of the costs, against showing everything", highlight=False)
    for note in notes_of(rows):
        console.print(note, highlight=False)
    console.print("\n± is half of a 95 % bootstrap interval over users; bold is the best of a column", highlight=False)


def notes_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each row that was made from a sample."""
    return [f"{row['name']}: {row['note']}" for row in rows if "note" in row]


def asks(question: Question, context: str) -> str:
    """What is asked; of the filter, also what a predictor has seen."""
    return f"{question.asks}; {CONTEXTS[context]}" if question is FILTER else question.asks


def sizes(s: Mapping[str, Any]) -> str:
    """One line: how much was asked."""
    return (
        f"{s['split']}: {s['requests']:,} requests ({s['primary_requests']:,} primary) of {s['users']:,} users, "
        f"{s['filter_events']:,} events ({s['filter_dislike_rate']:.1%} dislikes), {s['pools']:,} pools"
    )


def drawn(s: Mapping[str, Any]) -> str:
    """What to say of sizes that are of users drawn."""
    whole = s["drawn_from"]
    return (
        f"a sample: users, and pools where there are many, are drawn by a hash; the whole split has "
        f"{whole['requests']:,} requests of {whole['users']:,} users and {whole['filter_events']:,} events "
        "(eval.requests sets how many are drawn)"
    )


def cost_rule(costs: Mapping[str, float]) -> str:
    """The decision that follows from the costs, in words."""
    return (
        f"a dislike shown costs {costs['dislike']:g}, a like withheld {costs['like']:g}, so withhold where "
        f"P(dislike) >= {costs['like']:g} / ({costs['like']:g} + {costs['dislike']:g}) = {costs['threshold']:.3f}"
    )


def best_of(rows: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    """The best figure of a column as it is shown; None where no row has one."""
    return max((shown(row, metric) for row in rows if known(row, metric)), key=float, default=None)


def known(row: Mapping[str, Any], metric: str) -> bool:
    """Whether the row has the metric, and it is defined."""
    return metric in row and row[metric]["mean"] is not None


def shown(row: Mapping[str, Any], metric: str, of: str = "mean") -> str:
    """A figure of the row as tables show it; ``of`` may also be "half", that of its interval."""
    cell = row[metric]
    value = (cell["high"] - cell["low"]) / 2 if of == "half" else cell[of]
    if metric == "saved_per_1000":
        return f"{value:.1f}"
    return f"{value * 100:.1f}" if metric in PER_CENT else f"{value:.3f}"


def _grid(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str], compared: Iterable[str]) -> Table:
    """Those of the rows that have one of the metrics; the best of each metric ``compared`` is bold."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    best = {metric: best_of(rows, metric) for metric in compared}
    for kind in ("baseline", "model"):
        for row in rows:
            if row["kind"] == kind and any(known(row, metric) for metric in headings):
                table.add_row(row["name"], *(_cell(row, metric, best.get(metric)) for metric in headings))
        table.add_section()
    return table


def _cell(row: Mapping[str, Any], metric: str, best: str | None) -> str:
    if not known(row, metric):
        return ""
    text = shown(row, metric)
    text = f"[bold]{text}[/bold]" if text == best else text
    return text if row[metric]["low"] is None else f"{text} [dim]±{shown(row, metric, 'half')}[/dim]"


def _check_shapes(evalset: EvalSet, name: str, predicted: Predictions) -> None:
    """ValueError where a prediction has another shape than the evaluation set, or is not finite."""
    expected = {
        "generated": (len(evalset.requests), TOP),
        "filter_score": (len(evalset.filter_user),),
        "pool_score": evalset.pool_items.shape,
        "expected_reward": (len(evalset.requests),),
    }
    for field, shape in expected.items():
        array = getattr(predicted, field)
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{name}: {field} has shape {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: {field} holds {int((~np.isfinite(array)).sum())} values that are not finite")
