"""``python -m bench.experiments.plots``: draws the figures of docs/results.md from bench/results, as SVG in docs/plots.

Each figure's description names a digest of the numbers that it shows, so that a test finds one that has drifted.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.command import Experiment
from bench.experiments.tables import COLUMNS, EFFECTS, RESULTS, RIVALS, ROOT
from negfast.files import atomic_file

PLOTS = ROOT / "docs" / "plots"
STYLE = {  # legible on white and on black
    **{f"{part}.color": "#808080" for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": "#808080" for part in ("edgecolor", "labelcolor", "titlecolor")},
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "negfast",  # the same bytes each time
}
CLEAR, UNCLEAR = "#2f81f7", "#808080"  # an interval away from zero, and one that holds it
RELIABLE = {"grpo": "#2f81f7", "boosted": "#d29922"}  # whose probabilities are drawn

Entry = tuple[str, Mapping[str, Any]]  # a label and a figure with its interval


@click.command(cls=Experiment)
@click.option("--out", default=PLOTS, type=click.Path(path_type=Path), show_default=True)
@click.option("--results", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(out: Path, results: Path) -> None:
    """Draws every figure whose results are there."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (file, shown, draw) in FIGURES.items():
        if not (results / file).exists():
            continue
        figures = shown(json.loads((results / file).read_text("utf-8")))
        with matplotlib.rc_context(STYLE):
            figure = draw(figures)
            figure.patch.set_alpha(0)
            with atomic_file(out / f"{name}.svg") as temporary:
                about = {"Date": None, "Creator": None, "Description": digest(figures)}
                figure.savefig(temporary, format="svg", bbox_inches="tight", metadata=about)


def digest(figures: Any) -> str:
    """Names the numbers that a figure shows."""
    return hashlib.sha256(json.dumps(figures).encode()).hexdigest()


def final_differences(result: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """The final weights minus each rival, by metric."""
    found = {(d["b"], d["metric"]): d for d in result["differences"] if d["a"] == "grpo"}
    named: dict[str, list[Entry]] = {
        metric: [(rival, _figure(found[rival, metric])) for rival in (*RIVALS, "sft-long") if (rival, metric) in found]
        for metric in EFFECTS
    }
    for entry in result["grpo_minus_sft"]:
        if "vs_long_mean_reward" in entry:
            named["mean_reward"].append((f"sft-long, seed {entry['seed']}", _figure(entry["vs_long_mean_reward"])))
    return named


def ablation_effects(result: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """What the final weights lose, or gain, without each part, by metric."""
    named: dict[str, list[Entry]] = {metric: [] for metric in EFFECTS}
    for row in result["rows"].values():
        for d in row["differences"]:
            if d["a"] == "grpo" and d["b"] == "default grpo" and d["metric"] in EFFECTS and row["name"] != "default":
                label = f"{row['name']}, seed {row['seed']}" if row["seed"] else row["name"]
                named[d["metric"]].append((label, _figure(d)))
    return named


def reliability(result: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Dislike rate against the probability said, in twentieths of the events, by ranker."""
    rows = {row["name"]: row for row in result["rows"]}
    return {
        name: [(part["probability"], part["dislike_rate"]) for part in rows[name]["filter_reliability"]]
        for name in RELIABLE
        if "filter_reliability" in rows.get(name, {})
    }


def draw_effects(figures: Mapping[str, Sequence[Entry]]) -> Figure:
    """A panel for each metric with entries: points with their intervals beside a line at zero."""
    figures = {metric: entries for metric, entries in figures.items() if entries}
    shared = len({tuple(name for name, _ in entries) for entries in figures.values()}) == 1
    height = 0.6 + 0.22 * max(len(entries) for entries in figures.values())
    figure = Figure(figsize=(11, height), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(figures), sharey=shared, squeeze=False)[0]
    for panel, (metric, entries) in zip(panels, figures.items(), strict=True):
        panel.axvline(0, color=UNCLEAR, linewidth=0.8)
        limit = span_of([value for _, value in entries])
        for place, (_, value) in enumerate(entries):
            clear = value["low"] > 0 or value["high"] < 0
            color = CLEAR if clear else UNCLEAR
            panel.plot([value["low"], value["high"]], [place, place], color=color, linewidth=1.5)
            panel.plot([value["mean"]], [place], "o", color=color, markersize=4)
            if abs(value["mean"]) > limit:  # cut off: its mean in figures
                edge = math.copysign(limit, value["mean"])
                panel.text(edge, place, f"{value['mean']:+.3g}", color=color, ha="left" if edge < 0 else "right")
        panel.set_yticks(range(len(entries)), [name for name, _ in entries])
        panel.set_ylim(len(entries) - 0.5, -0.5)
        low, high = panel.get_xlim()
        panel.set_xlim(max(low, -limit), min(high, limit))
        panel.locator_params(axis="x", nbins=4)
        panel.set_title(COLUMNS[metric])
    return figure


def span_of(figures: Sequence[Mapping[str, float]]) -> float:
    """How far from zero an axis goes: to the last interval's end, or not much beyond the second to last where one entry
    would leave no room for the others."""
    ends = sorted(1.1 * max(abs(value["low"]), abs(value["high"])) for value in figures)
    return 1.5 * ends[-2] if len(ends) > 1 and ends[-1] > 3 * ends[-2] else ends[-1]


def draw_reliability(figures: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    panel = figure.subplots()
    panel.plot([0, 0.6], [0, 0.6], color=UNCLEAR, linewidth=0.8)
    for name, points in figures.items():
        said, found = zip(*points, strict=True)
        panel.plot(said, found, "o-", color=RELIABLE[name], markersize=3, linewidth=1, label=name)
    panel.set_xlabel("probability said")
    panel.set_ylabel("share of dislikes found")
    panel.legend(frameon=False)
    return figure


def _figure(value: Mapping[str, Any]) -> dict[str, float]:
    return {end: value[end] for end in ("mean", "low", "high")}


FIGURES: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Figure]]] = {
    "differences": ("quality.json", final_differences, draw_effects),
    "reliability": ("quality.json", reliability, draw_reliability),
    "ablations": ("ablations.json", ablation_effects, draw_effects),
}

if __name__ == "__main__":
    main()
