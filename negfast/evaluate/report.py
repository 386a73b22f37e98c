"""`negfast report`: one HTML page about a run, with everything inside it: no script, no font, no link."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import click

import negfast
from negfast.config import to_toml
from negfast.data.dataset import Dataset, date_of
from negfast.evaluate.baselines.rates import rate_predictions
from negfast.evaluate.charts import Line, bar_chart, line_chart, percent
from negfast.evaluate.eval import evaluate_folder, write_report
from negfast.evaluate.predictions import predict_set
from negfast.evaluate.report_facts import SHARES, Example, Stratum, Tradeoff, examples, strata, tradeoffs
from negfast.evaluate.sets import check_choosable, evaluation_set
from negfast.evaluate.table import HEADLINE
from negfast.files import atomic_file, check_output_file
from negfast.runtime.run_folder import RunFolder

LOOKS = (  # what is measured on valid, and the least span of its axis: less is within the noise
    ("nll", "nats a future dislike", 0.05),
    ("reward", "expected reward", 0.001),
    ("FHR@20", "FHR@20", 0.04),
    ("filter_auc", "filter AUC", 0.04),
)
COMPARED = ("grpo", "boosted", "logistic", "item-rate")  # rows of the curves, the run's final weights first
HEADINGS = ("FHR@20", "filter AUC", "reduction", "pool HR@10", "pool AUC", "hit share")
STAGES = ("align", "sft", "grpo")
ROWS = {
    "popularity": "most dislikes so far",
    "recent-7d, recent-14d": "most dislikes in the last 7 or 14 days",
    "decay-4d": "dislikes that lose half their weight in 4 days",
    "recent-all-14d": "most events of any kind in the last 14 days",
    "knn-dislikes, knn-all": "items that go with the user's dislikes, or with all that the user had",
    "item-rate, user-rate": "the smoothed dislike rate of the item, or of the user, up to the day",
    "logistic, boosted, boosted-plus": "rankers of both rates; of those and more history; of all that the verdict sees",
    "sasrec-dislikes, sasrec-all": "a transformer over the sequence of items alone",
    "prior": "the community prior alone: what training starts from",
    "sft, grpo": "the model after these stages; grpo is the run's final weights",
}


def write_page(run: Path, out: Path | None) -> Path:
    """Writes the page to ``out`` (default RUN/report.html) and returns its path.

    The run's own table is read from RUN/report.json, and made where it is not there. Raises InputError as
    `RunFolder.finished_engine` does, and where a split has likes or dislikes only.
    """
    folder = RunFolder(run)
    out = out or folder.path / "report.html"
    check_output_file(out)
    engine = folder.finished_engine(None)
    if not (folder.path / "report.json").is_file():
        write_report(folder, *evaluate_folder(folder, "test", None))
    table = json.loads((folder.path / "report.json").read_text())
    data, log = engine.data, engine.log
    sets = [evaluation_set(log, engine.split, name) for name in ("valid", "test")]
    for evalset in sets:
        check_choosable(evalset)  # curves and rates of one kind of event say nothing
    click.echo("report: baselines and test split again, for curves and examples; takes minutes", err=True)
    predictions = dict(rate_predictions(log, data.items, sets, engine.fit_until)[1])
    predictions["grpo"] = predict_set(engine, sets[1], folder.calibration)
    final = predictions["grpo"]
    sections = [
        _head(folder, table),
        _table(table["rows"]),
        _training(folder),
        _filter(table["rows"], tradeoffs(sets[1], predictions, COMPARED)),
        _strata(strata(log, sets[1], final)),
        _codes(data),
        _examples(examples(data, sets[1], final, engine.config.train.seed), data.horizon),
        _made_of(folder, data),
    ]
    css = (Path(__file__).parent / "report.css").read_text()
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>negfast: {escape(folder.path.name)}</title><style>{css}</style></head>\n"
        f"<body><main>\n{chr(10).join(sections)}\n</main></body></html>\n"
    )
    with atomic_file(out) as temporary:
        temporary.write_text(page, "utf-8")
    return out


def _head(folder: RunFolder, table: Mapping[str, Any]) -> str:
    rows = {row["name"]: row for row in table["rows"]}
    model, best = rows["grpo"], _best_baseline(table["rows"])
    auc, cut, its_auc = model["filter_auc"], model["filter_reduction"], best["filter_auc"]["mean"]
    says = (
        f"Filter AUC {auc['mean']:.3f}, 95 % interval {_three(auc['low'])} to {_three(auc['high'])}; the best "
        f"baseline, {best['name']}, has {its_auc:.3f}, {_place(its_auc, auc)} that interval. Holding back the top 10 % "
        f"of events lowers the dislike rate by {percent(cut['mean'])}, with {best['name']} by "
        f"{percent(best['filter_reduction']['mean'])}."
    )
    if _chosen_step(folder) == 0:
        says += " GRPO's weights were not better on valid, so the run kept those of SFT."
    return (
        f"<h1>{escape(folder.path.resolve().name)}</h1>"
        f'<p class="soft">{table["split"]}: {table["requests"]:,} requests ({table["primary_requests"]:,} primary) of '
        f"{table['users']:,} users, {table['filter_events']:,} events "
        f"({percent(table['filter_dislike_rate'])} dislikes), {table['pools']:,} pools</p><p>{escape(says)}</p>"
    )


def _place(value: float, interval: Mapping[str, Any]) -> str:
    if interval["low"] is None or interval["low"] <= value <= interval["high"]:
        return "inside"
    return "below" if value < interval["low"] else "above"


def _chosen_step(folder: RunFolder) -> int | None:
    """The step of GRPO whose weights the run kept; None where it has no such stage."""
    chosen = [
        e["step"] for e in _lines(folder.path / "events.jsonl") if e["event"] == "chosen" and e["stage"] == "grpo"
    ]
    return chosen[-1] if chosen else None


def _best_baseline(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    scored = [row for row in rows if row["kind"] == "baseline" and "filter_auc" in row]
    return max(scored, key=lambda row: row["filter_auc"]["mean"])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    best = {
        metric: max((row[metric]["mean"] for row in rows if _known(row, metric)), default=None) for metric in HEADLINE
    }
    body, kind = [], "baseline"
    for row in rows:
        cells = "".join(f"<td>{_cell(row, metric, best[metric])}</td>" for metric in HEADLINE)
        first, kind = (' class="first"' if row["kind"] != kind else ""), row["kind"]
        body.append(f"<tr{first}><td>{escape(row['name'])}</td>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in HEADINGS)
    return (
        "<h2>Beside the baselines</h2><p>FHR@20: primary requests with one of 20 generated items disliked within the "
        "horizon. Filter AUC: every first like or dislike, scored before its day. Reduction: fall of the dislike rate "
        "when exactly the top 10 % is filtered. Pool: the disliked item among 99 that others consumed that day. Hit "
        "share: dislikes among the 20 that the user went on to like or dislike. ± is half of a 95 % bootstrap interval "
        f"over users; bold is the best of a column.</p>{_html_table(head, body)}{_row_names()}{_all_metrics(rows)}"
    )


def _row_names() -> str:
    lines = "".join(f"<li><b>{names}</b>: {escape(what)}</li>" for names, what in ROWS.items())
    return f"<details><summary>What the rows are</summary><ul>{lines}</ul></details>"


def _all_metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    models = [row for row in rows if row["kind"] == "model"]
    names = list(dict.fromkeys(m for row in models for m in row if isinstance(row[m], dict) and "mean" in row[m]))
    lines = [
        f"<tr><td>{escape(m)}</td>{''.join(f'<td>{_cell(row, m, None)}</td>' for row in models)}</tr>" for m in names
    ]
    head = "".join(f"<th>{escape(row['name'])}</th>" for row in models)
    return (
        "<details><summary>Every metric, with past dislikes or none, cold or warm items</summary>"
        f"{_html_table(head, lines)}</details>"
    )


def _html_table(head: str, rows: Sequence[str]) -> str:
    """A table that scrolls for itself on a narrow page; ``head`` follows an empty first cell."""
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _known(row: Mapping[str, Any], metric: str) -> bool:
    return metric in row and row[metric]["mean"] is not None


def _cell(row: Mapping[str, Any], metric: str, best: float | None) -> str:
    if not _known(row, metric):
        return ""
    value = row[metric]
    text = percent(value["mean"]) if metric == "filter_reduction" else f"{value['mean']:.3f}"
    text = f"<b>{text}</b>" if value["mean"] == best else text
    if value["low"] is None:
        return text
    half = (value["high"] - value["low"]) / 2
    return (
        f"{text} <small>±{half * 100:.1f}</small>"
        if metric == "filter_reduction"
        else f"{text} <small>±{half:.3f}</small>"
    )


def _training(folder: RunFolder) -> str:
    steps = _lines(folder.path / "metrics.jsonl")
    events = _lines(folder.path / "events.jsonl")
    cards = []
    for stage in STAGES:
        of_stage = [line for line in steps if line["stage"] == stage]
        cards.append(_card(f"{stage}: loss", _smoothed(of_stage, "loss", "loss")))
    of_grpo = [line for line in steps if line["stage"] == "grpo"]
    cards.append(_card("grpo: reward", _smoothed(of_grpo, "reward", "reward an answer")))
    shares = [Line("", [line["step"] for line in of_grpo], [line["mixed_share"] for line in of_grpo], color=2)]
    cards.append(_card("grpo: share of mixed views", line_chart(shares, "step", "share", from_zero=True)))
    cards.append(_card("grpo: KL to the SFT policy", _smoothed(of_grpo, "kl", "KL a token")))
    for metric, heading, span in LOOKS:
        lines = []
        for color, stage in enumerate(("sft", "grpo")):
            valid = [e for e in events if e["event"] == "valid" and e["stage"] == stage and metric in e]
            lines.append(Line(stage, [e["step"] for e in valid], [e[metric] for e in valid], color=color, dots=True))
        chart = line_chart(lines, "step of the stage", heading, span=span)
        cards.append(_card(f"valid: {heading}", chart))
    return f"<h2>Training</h2><p>Thin lines are single steps, thick ones their moving mean.</p>{_cards(cards)}"


def _smoothed(steps: Sequence[Mapping[str, Any]], key: str, label: str) -> str:
    known = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
    if not known:
        return line_chart([], "step", label)
    x, y = [step for step, _ in known], [value for _, value in known]
    width = max(len(y) // 20, 1)
    mean = [
        sum(y[max(i - width, 0) : i + width + 1]) / len(y[max(i - width, 0) : i + width + 1]) for i in range(len(y))
    ]
    return line_chart([Line("", x, y, faint=True), Line("", x, mean)], "step", label)


def _filter(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Tradeoff]) -> str:
    by_name = {row["name"]: row for row in rows}
    calibration = [
        Line(
            name,
            [point["probability"] for point in by_name[name]["filter_reliability"]],
            [point["dislike_rate"] for point in by_name[name]["filter_reliability"]],
            color=color,
            dots=True,
        )
        for color, name in enumerate(("grpo", "boosted"))
        if "filter_reliability" in by_name.get(name, {})
    ]
    trade = [
        Line(name, curve.likes_lost, curve.dislikes_avoided, color=color)
        for color, (name, curve) in enumerate(curves.items())
    ]
    at_ten = SHARES.tolist().index(0.1)
    at_ten_rows = [
        f"<tr><td>{escape(name)}</td><td>{percent(curve.dislikes_avoided[at_ten])}</td>"
        f"<td>{percent(curve.likes_lost[at_ten])}</td></tr>"
        for name, curve in curves.items()
    ]
    cards = [
        _card(
            "Dislikes avoided against likes lost",
            line_chart(
                trade,
                "likes lost",
                "dislikes avoided",
                x_format=percent,
                y_format=percent,
                from_zero=True,
                diagonal=True,
            ),
        ),
        _card(
            "Calibration: said, and come true",
            line_chart(calibration, "probability said", "dislike rate", from_zero=True, diagonal=True),
        ),
        _card(
            "With 10 % of the events held back",
            _html_table("<th>dislikes avoided</th><th>likes lost</th>", at_ten_rows),
        ),
    ]
    return (
        "<h2>As a filter</h2><p>Every first like or dislike of the test days, scored from the context before its day; "
        "those of highest score are held back. Observational: the log carries no propensities.</p>"
        f"{_cards(cards)}"
    )


def _strata(rows: Sequence[Stratum]) -> str:
    lines = [
        f"<tr><td>{row.label}</td><td>{row.events:,}</td><td>{_three(row.filter_auc)}</td>"
        f"<td>{row.requests:,}</td><td>{_three(row.fhr20)}</td></tr>"
        for row in rows
    ]
    head = "<th>events</th><th>AUC</th><th>requests</th><th>FHR@20</th>"
    cards = [
        _card(
            "Filter AUC",
            bar_chart([r.label for r in rows], [r.filter_auc or 0 for r in rows], "past dislikes", "AUC", show=1),
        ),
        _card(
            "FHR@20",
            bar_chart([r.label for r in rows], [r.fhr20 or 0 for r in rows], "past dislikes", "share", color=1, show=1),
        ),
        _card("In figures", _html_table(head, lines)),
    ]
    return (
        "<h2>By the number of past dislikes</h2><p>How much a user's own dislikes matter to what the model knows.</p>"
        f"{_cards(cards)}"
    )


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _codes(data: Dataset) -> str:
    cards, codebook = [], int(data.manifest["semantic_ids"]["codebook"])
    for level, column in enumerate(data.codes.T, 1):
        counts = [0] * codebook
        for code in column.tolist():
            counts[code] += 1
        counts.sort(reverse=True)
        used = sum(count > 0 for count in counts)
        chart = bar_chart(
            [f"rank {i + 1}" for i in range(codebook)], counts, "codes, most used first", "items", color=3
        )
        cards.append(_card(f"Level {level}: {used} of {codebook} codes in use", chart))
    return f"<h2>Codebook usage</h2><p>Items under each code of the semantic IDs.</p>{_cards(cards)}"


def _examples(shown: Sequence[Example], horizon: int) -> str:
    cards = []
    for example in shown:
        predicted = "".join(
            f'<li class="{ {"disliked": "hit", "liked": "liked", "": "open"}[word] }">{escape(title)}'
            f"{f' ({word})' if word else ''}</li>"
            for title, word in example.predicted
        )
        cards.append(
            _card(
                f"User {example.user}, end of {date_of(example.day)}",
                f'<p class="soft">liked last</p>{_list(example.liked)}<p class="soft">disliked last</p>'
                f'{_list(example.disliked)}<p class="soft">predicted dislikes</p><ol>{predicted}</ol>'
                f'<p class="soft">disliked in the next {horizon} days</p>{_list(example.future)}',
            )
        )
    return (
        "<h2>Example users</h2><p>Chosen at random among test users with at least 3 past dislikes, half of them with a "
        f"hit. What came true is marked.</p>{_cards(cards)}"
    )


def _list(titles: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(title)}</li>' for title in titles)}</ul>" if titles else "<p>nothing</p>"


def _made_of(folder: RunFolder, data: Dataset) -> str:
    counts, days, split = (data.manifest[key] for key in ("counts", "days", "split"))
    config = to_toml(folder.config)
    return (
        f"<h2>What it was made of</h2><p>{counts['events']:,} events of {counts['users']:,} users on "
        f"{counts['items']:,} items, {days['first']} to {days['last']}; horizon {split['horizon']} days, valid from "
        f"{split['valid']}, test from {split['test']}. negfast {negfast.__version__}.</p>"
        f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>"
    )


def _card(title: str, body: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{body}</div>'


def _cards(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def _lines(path: Path) -> list[dict[str, Any]]:
    text = re.sub(r"\bNaN\b", "null", path.read_text())
    return [json.loads(line) for line in text.splitlines()]
