"""From predictions to rows, from rows to JSON and to a table that a stranger can read."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from negfast.evaluate.bootstrap import interval, resample_users
from negfast.evaluate.metrics import (
    Samples,
    Similarity,
    filter_samples,
    generation_samples,
    pool_samples,
    reliability_curve,
    reward_samples,
)
from negfast.evaluate.predictions import TOP, Predictions
from negfast.evaluate.sets import EvalSet

HEADLINE = ("FHR@20", "filter_auc", "filter_reduction", "pool_hr@10", "pool_auc", "known_hit_dislike_share@20")


def evaluate_rows(
    evalset: EvalSet,
    predictions: Mapping[str, Predictions],
    similarity: Similarity | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row for each predictor: name, kind, and every metric it can have as {"mean", "low", "high"}.

    Intervals are 95 % percentile intervals of a bootstrap over the users of the evaluation set. A metric that is
    undefined (no such request, one class only) has None. Probabilities also give ``filter_reliability``.
    """
    samples = metric_samples(evalset, predictions, similarity, resamples, seed)
    rows = []
    for name, answer in predictions.items():
        row: dict[str, Any] = {"name": name, "kind": answer.kind}
        row |= {metric: interval(values) for metric, values in samples[name].items()}
        if answer.filter_score is not None and answer.filter_is_probability:
            row["filter_reliability"] = reliability_curve(answer.filter_score, evalset.filter_dislike)
        rows.append(row)
    return rows


def metric_samples(
    evalset: EvalSet,
    predictions: Mapping[str, Predictions],
    similarity: Similarity | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Samples]:
    """Every metric of every predictor under the same resamples of users: float64 [1 + resamples], the figure first."""
    users = np.unique(np.concatenate([evalset.requests.user, evalset.filter_user]))
    weights = resample_users(len(users), resamples, seed)
    of_request, of_event = (np.searchsorted(users, u) for u in (evalset.requests.user, evalset.filter_user))
    out: dict[str, Samples] = {}
    for name, answer in predictions.items():
        _check_shapes(evalset, name, answer)
        out[name] = {}
        if answer.generated is not None:
            out[name] |= generation_samples(evalset, answer.generated, weights, of_request, similarity)
        if answer.filter_score is not None:
            out[name] |= filter_samples(evalset, answer, weights, of_event)
        if answer.pool_score is not None:
            out[name] |= pool_samples(evalset, answer.pool_score, weights, of_request[evalset.pool_request])
        if answer.expected_reward is not None:
            out[name] |= reward_samples(evalset, answer.expected_reward, weights, of_request)
    return out


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


def to_json(evalset: EvalSet, rows: Sequence[Mapping[str, Any]]) -> str:
    """One JSON object: the split's sizes and the rows."""
    return json.dumps(summary(evalset) | {"rows": list(rows)}, allow_nan=False)


def summary(evalset: EvalSet) -> dict[str, Any]:
    """What the evaluation set holds."""
    return {
        "split": evalset.name,
        "requests": len(evalset.requests),
        "primary_requests": int(evalset.primary.sum()),
        "users": len(np.unique(evalset.requests.user)),
        "filter_events": len(evalset.filter_user),
        "filter_dislike_rate": float(evalset.filter_dislike.mean()),
        "pools": len(evalset.pool_items),
        "pools_redrawn": evalset.pools_redrawn,
        "pools_dropped": evalset.pools_dropped,
        "no_past_dislike_share": float(1 - evalset.past_dislike.mean()),
        "cold_dislike_share": float(evalset.cold_item[evalset.requests.dislikes].mean()),
    }


def print_table(evalset: EvalSet, rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """The headline metrics, baselines above models, the best of each column in bold; fits 100 columns."""
    console = console or Console(width=None if sys.stdout.isatty() else 100)
    headings = ("FHR@20", "filter AUC", "reduction %", "pool HR@10", "pool AUC", "hit share")
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=_title(evalset), title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    best = {
        metric: max((row[metric]["mean"] for row in rows if _mean(row, metric) is not None), default=None)
        for metric in HEADLINE
    }
    for kind in ("baseline", "model"):
        for row in (row for row in rows if row["kind"] == kind):
            table.add_row(row["name"], *(_cell(row, metric, best[metric]) for metric in HEADLINE))
        table.add_section()
    console.print(table)
    console.print(_LEGEND, highlight=False)


_LEGEND = """\
FHR@20       primary requests with one of 20 generated items disliked within the horizon
filter AUC   every first like or dislike, scored before its day: disliked above liked
reduction %  fall of the dislike rate when exactly the top 10 % of those events is filtered
pool         the disliked item among 99 that others consumed that day: within the first 10; AUC
hit share    dislikes among the 20 generated items that the user went on to like or dislike
±            half of a 95 % bootstrap interval over users; bold: the best of its column"""


def _title(evalset: EvalSet) -> str:
    s = summary(evalset)
    return (
        f"{s['split']}: {s['requests']:,} requests ({s['primary_requests']:,} primary) of {s['users']:,} users, "
        f"{s['filter_events']:,} events ({s['filter_dislike_rate']:.1%} dislikes), {s['pools']:,} pools"
    )


def _mean(row: Mapping[str, Any], metric: str) -> float | None:
    return row[metric]["mean"] if metric in row else None


def _cell(row: Mapping[str, Any], metric: str, best: float | None) -> str:
    mean = _mean(row, metric)
    if mean is None:
        return ""
    low, high = row[metric]["low"], row[metric]["high"]
    scale, digits = (100, 1) if metric == "filter_reduction" else (1, 3)
    text = f"{mean * scale:.{digits}f}"
    text = f"[bold]{text}[/bold]" if mean == best else text
    return text if low is None else f"{text} [dim]±{(high - low) / 2 * scale:.{digits}f}[/dim]"


def _check_shapes(evalset: EvalSet, name: str, answer: Predictions) -> None:
    """A model that answers something else than it was asked is a defect: ValueError."""
    expected = {
        "generated": (len(evalset.requests), TOP),
        "filter_score": (len(evalset.filter_user),),
        "pool_score": evalset.pool_items.shape,
        "expected_reward": (len(evalset.requests),),
    }
    for field, shape in expected.items():
        array = getattr(answer, field)
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{name}: {field} has shape {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: {field} holds {int((~np.isfinite(array)).sum())} values that are not finite")
