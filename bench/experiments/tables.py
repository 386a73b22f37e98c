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
    "no_past_dislike": "no past dislike",
    "nll": "nll",
    "reduction": "reduction %",
    "minus_truth_filled": "minus the truth",
    "true_probability": "true P(dislike) of the list",
    "top_dislikes": "share in the user's top 5 %",
    "verdict_rank_correlation": "rank correlation of verdicts",
}
FILTER = (
    *("filter_auc", "filter_auc/cold", "filter_auc/no_past_dislike"),
    *("filter_reduction", "filter_likes_lost_per_dislike", "filter_ece", "pool_hr@10", "pool_auc"),
)
GENERATION = (
    *("mean_reward", "FHR@20", "FHR@20/cold", "FHR@20/no_past_dislike"),
    *("known_hit_dislike_share@20", "pool_hr@10", "pool_auc"),
)
REFIT = ("sasrec-dislikes", "logistic", "boosted", "boosted-plus", "sft", "grpo")
COMPARED = ("mean_reward", "FHR@20", "filter_auc", "filter_reduction", "pool_hr@10", "pool_auc")
RIVALS = (
    *("decay-4d", "item-rate", "logistic", "boosted", "boosted-plus", "sasrec-dislikes"),
    *("prior", "grpo-no-align", "sft"),
)
EFFECTS = ("mean_reward", "FHR@20", "filter_auc", "pool_auc")
SHARPNESS = ("FHR@20", "mean_reward", "nll")
LOWER_IS_BETTER = ("filter_likes_lost_per_dislike", "filter_ece")


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
    return _rows_table([row for row in result["rows"] if "filter_auc" in row], FILTER)


def lists_table(result: Figures) -> str:
    return _rows_table([row for row in result["rows"] if "FHR@20" in row], GENERATION)


def differences_table(result: Figures) -> str:
    """The final model minus each rival."""
    found = {(d["b"], d["metric"]): d for d in result["differences"]}
    lines = [
        [f"`{rival}`", *(_difference(found.get((rival, metric)), metric) for metric in COMPARED)]
        for rival in RIVALS
        if any(b == rival for b, _ in found)
    ]
    return _table(["`grpo` minus", *map(_head, COMPARED)], lines)


def seeds_table(result: Figures) -> str:
    """GRPO against SFT, seed by seed."""
    lines = []
    for prefix, name in (("", "`sft`"), ("vs_long_", "`sft-long`")):
        for entry in result["grpo_minus_sft"]:
            if prefix + "filter_auc" in entry:
                shown = (_difference(entry.get(prefix + metric), metric) for metric in EFFECTS)
                lines.append([name, str(entry["seed"]), *shown])
    return _table(["`grpo` minus", "seed", *map(_head, EFFECTS)], lines)


def refit_table(result: Figures) -> str:
    """What the strongest rows gain by the refit."""
    gains = {(gain["name"], gain["metric"]): gain for gain in result["refit"]["minus_frozen"]}
    lines = []
    for row in result["refit"]["rows"]:
        if row["name"] in REFIT:
            shown = (_difference(gains.get((row["name"], metric)), metric) for metric in COMPARED)
            lines.append([_name(row), _mean(row.get("filter_auc"), "filter_auc"), *shown])
    return _table(["refit minus frozen", "AUC after the refit", *map(_head, COMPARED)], lines)


def ablations_table(result: Figures) -> str:
    """What each change does, after SFT and at the end."""
    lines = []
    for row in result["rows"]:
        found = {(d["a"], d["metric"]): d for d in row["differences"]}
        if row["name"] == "default":
            shown = [_mean(row[stage][metric], metric) for stage in ("sft", "grpo") for metric in EFFECTS]
        else:
            shown = [_difference(found.get((stage, m)), m) for stage in ("sft", "grpo") for m in EFFECTS]
        settings = ", ".join(f"`{key}`" for key in row["changed"])
        lines.append([row["name"], str(row["seed"]), settings, *shown])
    heads = [f"{_head(metric)}, {stage}" for stage in ("sft", "grpo") for metric in EFFECTS]
    return _table(["change", "seed", "settings", *heads], lines)


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
    "lists": ("quality.json", lists_table),
    "differences": ("quality.json", differences_table),
    "seeds": ("quality.json", seeds_table),
    "refit": ("quality.json", refit_table),
    "ablations": ("ablations.json", ablations_table),
    "sharpness": ("sharpness.json", sharpness_table),
    "simulated-filter": ("simulator.json", simulated_filter_table),
    "recovery": ("simulator.json", recovery_table),
}


def _head(metric: str) -> str:
    name, _, stratum = metric.partition("/")
    return f"{HEADS[name]}, {HEADS[stratum]}" if stratum else HEADS[name]


def _rows_table(rows: Sequence[Figures], metrics: Sequence[str]) -> str:
    """The rows, the best of each column in bold."""
    best = {}
    for metric in metrics:
        means = [row[metric]["mean"] for row in rows if metric in row and row[metric]["mean"] is not None]
        best[metric] = (min if metric in LOWER_IS_BETTER else max)(means, default=None)
    lines = [[_name(row), *(_best(row.get(metric), metric, best[metric]) for metric in metrics)] for row in rows]
    return _table(["", *map(_head, metrics)], lines)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _name(row: Figures) -> str:
    return f"`{row['name']}`"


def _best(value: Figures | None, metric: str, best: float | None) -> str:
    shown = _mean(value, metric)
    return f"**{shown}**" if value is not None and value["mean"] is not None and value["mean"] == best else shown


def _mean(value: Figures | None, metric: str) -> str:
    return "" if value is None or value["mean"] is None else _number(value["mean"] * _scale(metric), _digits(metric))


def _with_interval(value: Figures | None, metric: str) -> str:
    return "" if value is None else f"{_mean(value, metric)} {_interval(value, metric, sign=False)}"


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
