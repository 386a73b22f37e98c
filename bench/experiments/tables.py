"""``python -m bench.experiments.tables``: writes the tables of docs/results.md from bench/results, so that no figure of
theirs is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` in the page; what lies between is replaced. A table
whose result is not there says which command makes it.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bench.command import Experiment
from bench.experiments.semantic_id_runs import METRICS
from negfast.files import atomic_file

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "bench" / "results"

Figures = Mapping[str, Any]
COLUMNS = {
    "mean_reward": "mean reward",
    "FHR@20": "FHR@20",
    "filter_auc": "filter AUC",
    "filter_reduction": "reduction %",
    "pool_hr@10": "pool HR@10",
    "pool_auc": "pool AUC",
    "known_hit_dislike_share@20": "hit share",
}
COMPARED = {metric: head for metric, head in COLUMNS.items() if metric != "known_hit_dislike_share@20"}
RIVALS = (
    *("decay-4d", "item-rate", "logistic", "boosted", "boosted-plus", "sasrec-dislikes"),
    *("prior", "grpo-no-align", "sft"),
)
STRATA = {"cold": "cold item", "no_past_dislike": "no past dislike"}
EFFECTS = ("mean_reward", "FHR@20", "filter_auc", "pool_auc")


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
    file, command, make = TABLES[name]
    path = results / file
    result = json.loads(path.read_text("utf-8")) if path.exists() else None
    table = None if result is None else make(result)
    return f"*Not measured yet: `{command}` makes it.*\n" if table is None else table


def main_table(result: Figures) -> str:
    """Every row of the frozen table."""
    return _rows_table(result["rows"])


def refit_table(result: Figures) -> str | None:
    """Every row of the final refits, and what those gain that are fitted to anything."""
    if "refit" not in result:
        return None
    gains = {(gain["name"], gain["metric"]): gain for gain in result["refit"]["minus_frozen"]}
    lines = []
    for row in result["refit"]["rows"]:
        changed = {metric: gains.get((row["name"], metric)) for metric in COMPARED}
        if any(gain is not None and gain["mean"] for gain in changed.values()):
            lines.append([_name(row), *(_difference(gain, metric) for metric, gain in changed.items())])
    rows = _rows_table(result["refit"]["rows"])
    return f"{rows}\nRefit minus frozen, paired:\n\n{_table(['', *COMPARED.values()], lines)}"


def differences_table(result: Figures) -> str:
    """The final model minus each rival."""
    found = {(d["b"], d["metric"]): d for d in result["differences"] if d["a"] == "grpo"}
    lines = [
        [f"`{rival}`", *(_difference(found.get((rival, metric)), metric) for metric in COMPARED)]
        for rival in RIVALS
        if any(b == rival for b, _ in found)
    ]
    return _table(["`grpo` minus", *COMPARED.values()], lines)


def seeds_table(result: Figures) -> str:
    """GRPO against SFT, seed by seed."""
    metrics = ("mean_reward", "FHR@20", "filter_auc", "filter_reduction", "pool_auc")
    lines = []
    for prefix, name in (("", "`sft`"), ("vs_long_", "`sft-long`")):
        for entry in result["grpo_minus_sft"]:
            if prefix + "filter_auc" in entry:
                shown = (_difference(entry.get(prefix + metric), metric) for metric in metrics)
                lines.append([name, str(entry["seed"]), *shown])
    return _table(["`grpo` minus", "seed", *(COLUMNS[metric] for metric in metrics)], lines)


def strata_table(result: Figures) -> str:
    """Items without an event before T_valid, and requests and events of users without a past dislike."""
    metrics = ("FHR@20", "filter_auc", "pool_hr@10", "pool_auc")
    heads = [_head(f"{metric}/{stratum}") for stratum in STRATA for metric in metrics]
    lines = [
        [_name(row), *(_mean(row.get(f"{metric}/{stratum}"), metric) for stratum in STRATA for metric in metrics)]
        for row in result["rows"]
    ]
    return _table(["", *heads], lines)


def ablations_table(result: Figures) -> str:
    """What each part's absence changes, after SFT and at the end."""
    lines = []
    for row in result["rows"].values():
        found = {(d["a"], d["metric"]): d for d in row["differences"] if d["b"].startswith("default")}
        if row["name"] == "default":
            shown = [_mean(row[stage][metric], metric) for stage in ("sft", "grpo") for metric in EFFECTS]
        else:
            shown = [_difference(found.get((stage, m)), m) for stage in ("sft", "grpo") for m in EFFECTS]
        settings = ", ".join(f"`{key}`" for key in row["changed"])
        lines.append([row["name"], str(row["seed"]), settings, *shown])
    heads = [f"{COLUMNS[metric]}, {stage}" for stage in ("sft", "grpo") for metric in EFFECTS]
    return _table(["change", "seed", "settings", *heads], lines) + f"\nSteps of every run: {_steps(result)}.\n"


def likes_table(result: Figures) -> str:
    """Outcome against the likes in the prompt, and by the likes that a user has."""
    names = {"nll": "nll of F", "mean_reward": "mean reward", "filter_auc": "filter AUC"}
    shown = [
        [str(row["likes_shown"]), *(_difference(row["minus_none"][name], name) for name in names)]
        for row in result["rows"]
        if row["likes_shown"]
    ]
    held = []
    for part in result["by_history"]:
        low, high = part["likes"]
        likes = f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"
        figures = (_difference(part["minus_none"][name], name) for name in names)
        held.append([likes, f"{part['requests']:,}", f"{part['events']:,}", *figures])
    heads = [*names.values()]
    return (
        _table(["likes shown, at most", *heads], shown)
        + f"\nBy the likes that a user has, at most {result['trained_with']} of them shown:\n\n"
        + _table(["likes so far", "requests", "events", *heads], held)
    )


def prior_weight_table(result: Figures) -> str:
    """The final weights and the prior alone beside other weights of the prior."""
    metrics = {"nll of train futures": "nll, train", "nll of valid futures": "nll, valid", "mean reward": "mean_reward"}
    heads = ["mean reward" if metric == "mean_reward" else metric for metric in metrics.values()]
    lines = [
        [name, str(row["weight"]), *(_difference(row["minus_own"][key], metric) for key, metric in metrics.items())]
        for name in ("prior", "model")
        for row in result[name]
        if row["weight"] != result["trained_with"]
    ]
    learned = ", ".join(f"{name} {result[f'{name} learned']}" for name in ("prior", "model"))
    own = [
        f"{name} " + ", ".join(f"{metrics[key].replace('_', ' ')} {_mean(row[key], metrics[key])}" for key in metrics)
        for name in ("prior", "model")
        for row in result[name]
        if row["weight"] == result["trained_with"]
    ]
    table = _table(["", f"weight, minus {result['trained_with']}", *heads], lines)
    return f"{table}\nWith {result['trained_with']}: {'; '.join(own)}. Likeliest on train futures: {learned}.\n"


def verdict_growth_table(result: Figures) -> str:
    """AUCs of the verdict's prior and the boosted ranker by how far they learned, and what the last days brought."""
    names = ("verdict's prior", "boosted-plus", "mean of both")
    lines = []
    for row in result["rows"]:
        days = row["learned_until_days_before_T_valid"]
        until = "T_valid" if days == 0 else f"{days} days before" if days > 0 else "T_test"
        figures = [_mean(row[name], "filter_auc") for name in names]
        gains = [_difference(row["minus_before"].get(name), "filter_auc") for name in names]
        lines.append([row["split"], until, f"{row['events']:,}", *figures, *gains])
    heads = ["asked about", "learned until", "events", *names, *(f"{name}, gained" for name in names)]
    return _table(heads, lines)


def sharpness_table(result: Figures) -> str:
    """GRPO's policy beside its rivals as they are and at its entropy."""
    found = {(d["b"], d["metric"]): d for d in result["differences"]}
    lines = [
        [
            row["name"],
            _number(row["temperature"], 2),
            _number(row["entropy"], 2),
            *(_mean(row[metric], metric) for metric in ("nll", "mean_reward")),
            *(_difference(found.get((row["name"], metric)), metric) for metric in ("nll", "mean_reward")),
        ]
        for row in result["rows"]
    ]
    heads = ["temperature", "entropy", "nll of F", "mean reward", "GRPO minus it, nll", "mean reward"]
    return _table(["", *heads], lines) + f"\nMeans over runs: {result['runs']}.\n"


def ceiling_table(result: Figures) -> str:
    """The oracles, and the liability model's figures."""
    metrics = ("filter_auc", "filter_reduction")
    lines = [[row["name"], *(_with_interval(row[metric], metric) for metric in metrics)] for row in result["oracles"]]
    model = [[name, _number(value, 3)] for name, value in result["liability"].items()]
    return _table(["ranker", *(COLUMNS[m] for m in metrics)], lines) + "\n" + _table(["liability model", ""], model)


def semantic_ids_table(result: Figures) -> str | None:
    """What follows from each quantizer, and each minus the first."""
    if "downstream" not in result:
        return None
    found = result["downstream"]
    differences = {(d["a"], d["metric"]): d for d in found["differences"]}
    lines = [[row["quantizer"], *(_mean(row[metric], metric) for metric in METRICS)] for row in found["rows"]]
    first, *others = (row["quantizer"] for row in found["rows"])
    lines += [
        [f"{other} minus {first}", *(_difference(differences.get((other, metric)), metric) for metric in METRICS)]
        for other in others
    ]
    settings = ", ".join(f"`{setting}`" for setting in found["settings"])
    return _table(["", *map(_head, METRICS)], lines) + f"\nSettings: {settings}; seeds {_listed(found['seeds'])}.\n"


def alignment_table(result: Figures) -> str:
    """The title task by the times that it has seen each title."""
    shown = {
        "title_sid_level1": "first code, held out",
        "title_sid_level1_top10": "in its first ten",
        "title_sid_level1_chance": "commonest code",
        "title_sid_train_level1": "first code, trained on",
        "title_sid_item": "item, held out",
        "title_sid_train_item": "item, trained on",
    }
    lines = [
        [str(row["steps"]), _number(row["epochs"], 1), *(_number(row[key], 3) for key in shown)]
        for row in result["rows"]
    ]
    return _table(["steps", "epochs", *shown.values()], lines)


def recovery_table(result: Figures) -> str | None:
    """How well models trained on each target find true dislikes."""
    if "recovery" not in result:
        return None
    found = result["recovery"]
    metrics = {
        "true_probability": "true P(dislike) of the 20 generated",
        "top_dislikes": "of them in the user's top 5 %",
        "verdict_rank_correlation": "rank correlation of verdicts",
    }
    names = ("random", "prior", "next", "later", "window", "best", "window-next", "window-later")
    lines = []
    for name in names:
        figures = [found.get(f"{name}/{metric}") for metric in metrics]
        show = _difference if "-" in name else _mean
        lines.append([name.replace("-", " minus "), *(show(figure, "") for figure in figures)])
    about = f"{found['steps']} steps of SFT, seeds {_listed(found['seeds'])}, {found['requests']} requests"
    return _table(["trained on", *metrics.values()], lines) + f"\n{about}.\n"


def language_model_table(result: Figures) -> str:
    """A language model beside the small model, and what each stage changes."""
    lines = [[row["name"], *(_mean(row[metric], metric) for metric in METRICS)] for row in result["rows"]]
    found: dict[tuple[str, str], dict[str, Figures]] = {}
    for d in result["differences"]:
        found.setdefault((d["a"], d["b"]), {})[d["metric"]] = d
    lines += [
        [f"{a} minus {b}", *(_difference(of_pair.get(metric), metric) for metric in METRICS)]
        for (a, b), of_pair in found.items()
    ]
    about = f"Steps: {_steps(result)}; {result['share']:.0%} of valid's users."
    return _table(["", *map(_head, METRICS)], lines) + f"\n{about}\n"


TABLES: dict[str, tuple[str, str, Callable[[Any], str | None]]] = {
    "main": ("quality.json", "python -m bench quality", main_table),
    "differences": ("quality.json", "python -m bench quality", differences_table),
    "seeds": ("quality.json", "python -m bench quality", seeds_table),
    "strata": ("quality.json", "python -m bench quality", strata_table),
    "refit": ("quality.json", "python -m bench quality", refit_table),
    "ablations": ("ablations.json", "python -m bench.experiments.ablations --budget 0.25", ablations_table),
    "ablations-full": (
        "ablations_full.json",
        "python -m bench.experiments.ablations --only NAME --out bench/results/ablations_full.json",
        ablations_table,
    ),
    "prior-weight": ("prior_weight.json", "python -m bench.experiments.prior_weight RUN", prior_weight_table),
    "prior-weight-fitted": (
        "prior_weight_fitted.json",
        "python -m bench.experiments.prior_weight RUN --out bench/results/prior_weight_fitted.json",
        prior_weight_table,
    ),
    "sharpness": ("sharpness.json", "python -m bench.experiments.sharpness RUN...", sharpness_table),
    "sharpness-long": (
        "sharpness_long.json",
        "python -m bench.experiments.sharpness RUN --long RUN --out bench/results/sharpness_long.json",
        sharpness_table,
    ),
    "verdict-growth": ("verdict_growth.json", "python -m bench.experiments.verdict_growth", verdict_growth_table),
    "likes": ("likes.json", "python -m bench.experiments.likes RUN", likes_table),
    "semantic-ids": ("semantic_ids.json", "python -m bench.experiments.semantic_ids --runs DIR", semantic_ids_table),
    "semantic-ids-seeds": (
        "semantic_ids_seeds.json",
        "python -m bench.experiments.semantic_ids --runs DIR --quantizers rq-kmeans,rq-vae --seeds 0,1,2 --steps 100",
        semantic_ids_table,
    ),
    "alignment": ("alignment.json", "python -m bench.experiments.alignment", alignment_table),
    "recovery": ("simulator.json", "python -m bench.experiments.simulator --parts recovery", recovery_table),
    "language-model": (
        "language_model.json",
        "python -m bench.experiments.language_model MODEL",
        language_model_table,
    ),
    "ceiling": ("ceiling.json", "python -m bench.experiments.ceiling --data DIR", ceiling_table),
}


def _head(metric: str) -> str:
    name, _, stratum = metric.partition("/")
    head = "nll of F" if name == "nll" else COLUMNS[name]
    return f"{head}, {STRATA[stratum]}" if stratum else head


def _steps(result: Figures) -> str:
    return ", ".join(f"{stage} {count}" for stage, count in result["steps"].items())


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _rows_table(rows: Sequence[Figures]) -> str:
    best = {}
    for metric in COLUMNS:
        means = [row[metric]["mean"] for row in rows if metric in row and row[metric]["mean"] is not None]
        best[metric] = max(means, default=None)
    lines = [[_name(row), *(_best(row.get(metric), metric, best[metric]) for metric in COLUMNS)] for row in rows]
    return _table(["", *COLUMNS.values()], lines)


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


def _with_interval(value: Figures, metric: str) -> str:
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
    return 100.0 if metric == "filter_reduction" else 1.0


def _digits(metric: str) -> int:
    return {"filter_reduction": 1, "mean_reward": 5, "filter_auc": 4, "pool_auc": 4}.get(metric.partition("/")[0], 3)


def _number(value: float, digits: int, sign: bool = False) -> str:
    """Without a zero before the point: .802, +.005, 27.2."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


if __name__ == "__main__":
    main()
