"""``python -m bench.experiments.tables``: writes the tables of docs/results.md from bench/results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; what lies between is replaced.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bench.command import Experiment
from negfast.files import atomic_file

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "bench" / "results"

Figures = Mapping[str, Any]
HEADS = {
    "mean_reward": "mean reward",
    "FHR@20": "FHR@20",
    "known_hit_dislike_share@20": "hit share",
    "filter_auc": "filter AUC",
    "filter_reduction": "reduction %",
    "filter_likes_lost_per_dislike": "likes lost",
    "filter_ece": "ECE",
    "pool_hr@10": "pool HR@10",
    "pool_auc": "pool AUC",
    "cold": "cold item",
    "cold_user": "cold user",
    "nll": "nll",
    "reduction": "reduction %",
    "minus_truth_filled": "minus the truth",
    "true_probability": "true P(dislike) of the list",
    "top_dislikes": "share in the user's top 5 %",
    "verdict_rank_correlation": "rank correlation of verdicts",
}
FILTER = (
    *("filter_auc", "filter_auc/cold", "filter_auc/cold_user"),
    *("filter_reduction", "filter_likes_lost_per_dislike", "filter_ece", "pool_hr@10"),
)
FILTERS = ("item-rate", "boosted", "boosted-plus", "verdict")
LISTS = ("popularity", "recent-14d", "decay-4d", "knn-dislikes", "prior", "sft", "grpo")
GENERATION = ("mean_reward", "FHR@20", "FHR@20/cold", "known_hit_dislike_share@20")
COMPARED = ("filter_auc", "filter_reduction", "pool_hr@10", "pool_auc")
LISTED = ("mean_reward", "FHR@20")
TASTE = ("auc", "minus_rival", "stacked_minus_rival", "stacked_minus_verdict")
SHARPNESS = ("FHR@20", "mean_reward", "nll")


@click.command(cls=Experiment)
@click.option("--page", default=PAGE, type=click.Path(path_type=Path), show_default=True)
@click.option("--results", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(page: Path, results: Path) -> None:
    """Replaces every table of the page."""
    text = page.read_text("utf-8")
    found = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
    unknown = {match[1] for match in found.finditer(text)} - set(TABLES)
    if unknown:
        raise click.UsageError(f"{page}: unknown tables {', '.join(sorted(unknown))}; known: {', '.join(TABLES)}")
    text = found.sub(lambda match: f"<!-- table: {match[1]} -->\n{written(match[1], results)}<!-- end -->", text)
    with atomic_file(page) as temporary:
        temporary.write_text(text, "utf-8")


def written(name: str, results: Path) -> str:
    """The table ``name`` as Markdown."""
    file, make = TABLES[name]
    return make(json.loads((results / file).read_text("utf-8")))


def filter_table(result: Figures) -> str:
    """Filters of every log and context, with intervals."""
    lines = []
    for entry in result["entries"]:
        for row in _chosen(entry, FILTERS, "filter_auc"):
            figures = [_with_interval(row.get(metric), metric) for metric in FILTER]
            lines.append([_log(entry), _name(row), *figures])
    return _table(["log", "", *map(_head, FILTER)], lines)


def filter_gains_table(result: Figures) -> str:
    """The verdict minus each rival."""
    pairs = [("verdict", rival) for rival in ("item-rate", "boosted", "boosted-plus")]
    return _gains(result, pairs, COMPARED)


def lists_table(result: Figures) -> str:
    """Lists of every log that has a trained run."""
    lines = []
    for entry in result["entries"]:
        trained = any(row["name"] == "grpo" for row in entry["rows"])
        for row in _chosen(entry, LISTS, "FHR@20") if trained else ():
            lines.append([_log(entry), _name(row), *(_with_interval(row.get(m), m) for m in GENERATION)])
    return _table(["log", "", *map(_head, GENERATION)], lines)


def list_gains_table(result: Figures) -> str:
    """The lists of the final policy minus those of each rival."""
    return _gains(result, [("grpo", rival) for rival in ("decay-4d", "prior", "sft")], LISTED)


def taste_table(result: Figures) -> str:
    """What each arm adds to the rival."""
    lines = []
    for entry in result["entries"]:
        for row in entry["rows"]:
            shown = [_with_interval(row["auc"], "filter_auc")]
            shown += [_difference(row.get(figure), "filter_auc") for figure in TASTE[1:]]
            lines.append([f"{entry['data']}, {entry['test']:,}", _name(row), str(len(row["by_seed"])), *shown])
    heads = ["AUC", "minus the rival", "stacked, minus the rival", "stacked, minus the stacked verdict"]
    return _table(["log, questions", "arm", "seeds", *heads], lines)


def sharpness_table(result: Figures) -> str:
    """GRPO beside SFT as it is, and at GRPO's entropy, on each split."""
    lines = []
    for split, found in result.items():
        gains = {(d["b"], d["metric"]): d for d in found["differences"]}
        for row in found["rows"]:
            figures = [f"{row['temperature']:.2f}", f"{row['entropy']:.2f}"]
            figures += [_mean(row[metric], metric) for metric in SHARPNESS]
            figures += [_difference(gains.get((row["name"], metric)), metric) for metric in SHARPNESS]
            lines.append([split, f"`{row['name']}`", *figures])
    heads = [*map(_head, SHARPNESS), *(f"GRPO minus it, {_head(metric)}" for metric in SHARPNESS)]
    return _table(["split", "", "temperature", "entropy", *heads], lines)


def simulated_filter_table(result: Figures) -> str:
    """The effect of a filter, true and estimated."""
    metrics = ("reduction", "minus_truth_filled")
    lines = [[row["name"], *(_with_interval(row.get(metric), metric) for metric in metrics)]
             for row in result["filter"]["rows"]]  # fmt: skip
    return _table(["", *map(_head, metrics)], lines)


def recovery_table(result: Figures) -> str:
    """How well models trained on each target find true dislikes."""
    metrics = ("true_probability", "top_dislikes", "verdict_rank_correlation")
    lines = []
    for row in result["recovery"]["rows"]:
        show = _difference if " minus " in row["name"] else _mean
        lines.append([row["name"], *(show(row.get(metric), metric) for metric in metrics)])
    return _table(["trained on", *map(_head, metrics)], lines)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "filter": ("quality.json", filter_table),
    "filter-gains": ("quality.json", filter_gains_table),
    "lists": ("quality.json", lists_table),
    "list-gains": ("quality.json", list_gains_table),
    "taste": ("taste.json", taste_table),
    "sharpness": ("sharpness.json", sharpness_table),
    "simulated-filter": ("simulator.json", simulated_filter_table),
    "recovery": ("simulator.json", recovery_table),
}


def _head(metric: str) -> str:
    name, _, stratum = metric.partition("/")
    return f"{HEADS[name]}, {HEADS[stratum]}" if stratum else HEADS[name]


def _log(entry: Figures) -> str:
    return f"{entry['data']}, {entry['filter_context']}"


def _chosen(entry: Figures, names: Sequence[str], metric: str) -> list[Figures]:
    rows = {row["name"]: row for row in entry["rows"] if metric in row}
    return [rows[name] for name in names if name in rows]


def _gains(result: Figures, pairs: Sequence[tuple[str, str]], metrics: Sequence[str]) -> str:
    lines = []
    for entry in result["entries"]:
        found = {(d["a"], d["b"], d["metric"]): d for d in entry["differences"]}
        for a, b in pairs:
            if (a, b, metrics[0]) in found or (a, b, metrics[-1]) in found:
                shown = (_difference(found.get((a, b, metric)), metric) for metric in metrics)
                lines.append([_log(entry), f"`{a}` - `{b}`", *shown])
    return _table(["log", "", *map(_head, metrics)], lines)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _name(row: Figures) -> str:
    return f"`{row['name']}`"


def _mean(value: Figures | None, metric: str) -> str:
    return "" if value is None or value["mean"] is None else _number(value["mean"] * _scale(metric), _digits(metric))


def _with_interval(value: Figures | None, metric: str) -> str:
    if value is None or value["mean"] is None or value["low"] is None:
        return _mean(value, metric)
    return f"{_mean(value, metric)} {_interval(value, metric, sign=False)}"


def _difference(value: Figures | None, metric: str) -> str:
    """+.005 [.002, .008]; bold where the interval is clear of zero."""
    if value is None or value["mean"] is None or value["low"] is None or value["high"] is None:
        return ""
    if value["mean"] == value["low"] == value["high"] == 0:
        return "0"
    mean = _number(value["mean"] * _scale(metric), _digits(metric), sign=True)
    clear = value["low"] > 0 or value["high"] < 0
    return f"{f'**{mean}**' if clear else mean} {_interval(value, metric, sign=True)}"


def _interval(value: Figures, metric: str, sign: bool) -> str:
    low, high = (_number(value[end] * _scale(metric), _digits(metric), sign) for end in ("low", "high"))
    return f"[{low}, {high}]"


def _scale(metric: str) -> float:
    return 100.0 if metric in ("filter_reduction", "reduction", "minus_truth_filled") else 1.0


def _digits(metric: str) -> int:
    if _scale(metric) > 1:
        return 1
    return {"mean_reward": 5, "filter_auc": 4, "filter_ece": 4, "pool_auc": 4}.get(metric.partition("/")[0], 3)


def _number(value: float, digits: int, sign: bool = False) -> str:
    """Without a zero before the point: .802, +.005, 27.2."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


if __name__ == "__main__":
    main()
