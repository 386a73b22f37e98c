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
from negfast.data.dataset import Dataset, date_of, refuse_data_folder
from negfast.errors import InputError
from negfast.evaluate.charts import Line, bar_chart, changes, line_chart, percent
from negfast.evaluate.eval import baselines_of, evaluate_folder, write_report
from negfast.evaluate.predictions import TOP, Predictions, verdict_predictions
from negfast.evaluate.report_facts import (
    SHARES,
    Comparison,
    Example,
    Savings,
    Stratum,
    Tradeoff,
    compare,
    examples,
    savings,
    strata,
    tradeoffs,
)
from negfast.evaluate.sets import check_choosable, engine_set
from negfast.evaluate.table import (
    CONTEXTS,
    FILTER,
    GENERATION,
    MATCHED_POOL,
    PER_CENT,
    QUESTIONS,
    Question,
    asks,
    best_of,
    drawn,
    known,
    notes_of,
    shown,
)
from negfast.files import atomic_file, check_output_file
from negfast.runtime.generation import generate
from negfast.runtime.run_folder import RunFolder

LOOKS = (  # what is measured on valid, its name, the label of its axis, and the least span of that axis: noise
    ("nll", "nats a future dislike", "nats a future dislike", 0.05),
    ("reward", "expected reward", "expected reward", 0.001),
    ("FHR@20", "FHR@20", "FHR@20", 0.04),
)
COMPARED = ("verdict", "boosted-plus", "logistic", "item-rate")  # of the filter's curves
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
    "verdict": "the filter: the dislike classifier, fitted after the stages",
    "sft, grpo": "lists of the weights after these stages; those of grpo are the run's",
}


def write_page(run: Path, out: Path | None) -> Path:
    """Writes the page to ``out`` (default RUN/report.html) and returns its path.

    The run's own table is read from RUN/report.json, and made where that is missing or of other data. Raises InputError
    as `RunFolder.finished_engine` does, and where a split has likes or dislikes only.
    """
    folder = RunFolder(run)
    out = out or folder.path / "report.html"
    check_output_file(out)
    refuse_data_folder(out)
    engine = folder.finished_engine(None)
    table = _table(folder)
    if table.get("fingerprint") != engine.data.fingerprint:  # none yet, or the data set has grown since
        write_report(folder, *evaluate_folder(folder, "test", None))
        table = _table(folder)
    rows, data, config = table["rows"], engine.data, engine.config
    context = config.history.context
    sets = {name: engine_set(engine, name) for name in ("valid", "test")}
    for evalset in sets.values():
        check_choosable(evalset)  # curves and rates of one kind of event say nothing
    click.echo("report: baselines and test split again, for curves and examples; takes minutes", err=True)
    test = sets["test"]
    predictions, columns = baselines_of(engine, sets, "test", trained=False)
    generated = generate(engine, test.requests, TOP)[0]
    verdict = predictions["verdict"] = verdict_predictions(engine.policy.verdict, test, columns, folder.calibration)
    predictions["grpo"] = Predictions(generated=generated)
    assert verdict.filter_score is not None
    found = compare(test, predictions, rows, config.eval.resamples, config.train.seed)
    beside = [*found["filter_auc"].baselines[:1]] if "filter_auc" in found else []
    saved = savings(test, predictions, ["verdict", *beside], config.eval.resamples, config.train.seed)
    sections = {  # id -> what the contents list says, and the section
        "filter": ("Filter", _filter(rows, context, found, tradeoffs(test, predictions, COMPARED))),
        "costs": ("What withholding saves", _costs(saved, context, table["filter_dislike_rate"])),
        "past": ("By past dislikes", _strata(strata(engine.log, test, verdict.filter_score, generated), context)),
        "pool": ("Matched pool", _question(MATCHED_POOL, context, rows, found)),
        "generation": ("Generation", _question(GENERATION, context, rows, found)),
        "training": ("Training", _training(folder)),
        "more": (
            "Every metric, codebooks, example users, configuration",
            _all_metrics(rows, context)
            + _codes(data)
            + _examples(examples(data, test, generated, config.train.seed), data.horizon)
            + _made_of(folder, data),
        ),
    }
    contents = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in sections.items())
    body = [_head(folder, data, table, found), f"<nav><ul>{contents}</ul></nav>"]
    body += [f'<section id="{name}">{section}</section>' for name, (_, section) in sections.items()]
    css = (Path(__file__).parent / "report.css").read_text()
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>negfast: {escape(folder.path.name)}</title><style>{css}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )
    with atomic_file(out) as temporary:
        temporary.write_text(page, "utf-8")
    return out


def _table(folder: RunFolder) -> dict[str, Any]:
    """What RUN/report.json holds; nothing where it is missing. InputError where it is damaged."""
    own = folder.path / "report.json"
    return _json(own, own.read_text()) if own.is_file() else {}


def _head(folder: RunFolder, data: Dataset, table: Mapping[str, Any], found: Mapping[str, Comparison]) -> str:
    title = _log_name(data.manifest)
    if "filter_auc" in found:
        title += f": the filter is {found['filter_auc'].words} {_best(found['filter_auc'])}"
    days, split = data.manifest["days"], data.manifest["split"]
    lines = []
    for question in QUESTIONS:
        metric, (heading, _) = next(iter(question.figures.items()))
        if metric in found:
            says = _verdict(table["rows"], metric, heading, found[metric])
            lines.append(f"<li><b>{question.name}.</b> {escape(says)}</li>")
    kept = "<p>GRPO's weights were not better on valid, so the run kept those of SFT.</p>"
    return (
        f"<h1>{escape(title)}</h1>"
        f'<p class="soft">Run {escape(folder.path.resolve().name)}. Test days {split["test"]} to {days["last"]}: '
        f"{table['requests']:,} requests ({table['primary_requests']:,} primary) of {table['users']:,} users, "
        f"{table['filter_events']:,} first likes and dislikes ({percent(table['filter_dislike_rate'])} dislikes), "
        f"{table['pools']:,} pools{'; ' + escape(drawn(table)) if 'drawn_from' in table else ''}.</p>"
        f'<ul class="verdicts">{"".join(lines)}</ul>{kept if _chosen_step(folder) == 0 else ""}'
        '<p class="soft">In brackets: the 95 % interval of the paired difference, a bootstrap over users. "Level with" '
        "means that it holds zero.</p>"
    )


def _log_name(manifest: Mapping[str, Any]) -> str:
    """The sample's name, or that of the first file that the data set was made of."""
    first = next(iter(manifest["sources"].values()))["name"]
    return str(manifest.get("sample", first))


def _best(comparison: Comparison) -> str:
    """The best baseline in words; all of them where their figures are the same as shown."""
    *others, last = comparison.baselines
    return f"the best baselines, {', '.join(others)} and {last}" if others else f"the best baseline, {last}"


def _verdict(rows: Sequence[Mapping[str, Any]], metric: str, heading: str, comparison: Comparison) -> str:
    """One sentence: both figures, and their difference with its interval, to a digit more."""
    by_name = {row["name"]: row for row in rows}
    own, best = (shown(by_name[name], metric) for name in (comparison.model, comparison.baselines[0]))
    scale, digits, unit = (100, 2, " %") if metric in PER_CENT else (1, 4, "")
    mean, low, high = (
        "" if value is None else f"{value * scale:+.{digits}f}"
        for value in (comparison.difference[key] for key in ("mean", "low", "high"))
    )
    between = f"; difference {mean} [{low}, {high}]" if low else ""
    name = heading.removesuffix(unit)
    return f"{name} {own}{unit}, {comparison.words} {_best(comparison)} ({best}{unit}){between}."


def _chosen_step(folder: RunFolder) -> int | None:
    """The step of GRPO whose weights the run kept; None where it has no such stage."""
    chosen = [
        e["step"] for e in _lines(folder.path / "events.jsonl") if e["event"] == "chosen" and e["stage"] == "grpo"
    ]
    return chosen[-1] if chosen else None


def _question(
    question: Question, context: str, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Comparison]
) -> str:
    """A heading, what is asked, the verdict of each figure and the table of the rows that have one."""
    asked = asks(question, context)
    asked = asked[0].upper() + asked[1:]
    verdicts = "".join(
        f"<li>{escape(_verdict(rows, metric, heading, found[metric]))}</li>"
        for metric, (heading, _) in question.figures.items()
        if metric in found
    )
    best = {metric: best_of(rows, metric) for metric in question.figures}
    answering = [row for row in rows if any(known(row, metric) for metric in question.figures)]
    body, kind = [], "baseline"
    for row in answering:
        cells = "".join(f"<td>{_cell(row, metric, best[metric])}</td>" for metric in question.figures)
        first, kind = (' class="first"' if row["kind"] != kind else ""), row["kind"]
        body.append(f"<tr{first}><td>{escape(row['name'])}</td>{cells}</tr>")
    head = "".join(f"<th>{heading}</th>" for heading, _ in question.figures.values())
    says = " ".join(f"{heading}: {what}." for heading, what in question.figures.values())
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes_of(answering))
    return (
        f"<h2>{question.name}</h2><p>{escape(asked)}.</p><ul>{verdicts}</ul>{_html_table(head, body)}"
        f'<p class="soft">{escape(says)} ± is half of a 95 % bootstrap interval over users; bold is the best of a '
        f"column.</p>{notes}"
    )


def _row_names() -> str:
    lines = "".join(f"<li><b>{names}</b>: {escape(what)}</li>" for names, what in ROWS.items())
    return f"<details><summary>What the rows are</summary><ul>{lines}</ul></details>"


def _all_metrics(rows: Sequence[Mapping[str, Any]], context: str) -> str:
    models = [row for row in rows if row["kind"] == "model"]
    names = list(dict.fromkeys(m for row in models for m in row if isinstance(row[m], dict) and "mean" in row[m]))
    lines = [
        f"<tr><td>{escape(m)}{' %' if m in PER_CENT else ''}</td>"
        f"{''.join(f'<td>{_cell(row, m, None)}</td>' for row in models)}</tr>"
        for m in names
    ]
    head = "".join(f"<th>{escape(row['name'])}</th>" for row in models)
    return (
        "<h2>More</h2><details><summary>Every metric, with past dislikes or none, cold or warm items</summary>"
        f"<p>Those of the filter: {escape(CONTEXTS[context])}.</p>"
        f"{_html_table(head, lines)}</details>"
    )


def _html_table(head: str, rows: Sequence[str], corner: str = "") -> str:
    """A table that scrolls for itself on a narrow page; ``head`` follows the first cell, ``corner``."""
    return (
        f'<div class="scroll"><table><thead><tr><th>{corner}</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(row: Mapping[str, Any], metric: str, best: str | None) -> str:
    if not known(row, metric):
        return ""
    text = shown(row, metric)
    cell = f"<b>{text}</b>" if text == best else text
    return cell if row[metric]["low"] is None else f"{cell} <small>±{shown(row, metric, 'half')}</small>"


def _training(folder: RunFolder) -> str:
    steps = _lines(folder.path / "metrics.jsonl")
    events = _lines(folder.path / "events.jsonl")
    of_grpo = [line for line in steps if line["stage"] == "grpo"]
    charts = []  # title, lines, label of x, label of y, least span
    for stage in STAGES:
        of_stage = [line for line in steps if line["stage"] == stage]
        charts.append((f"{stage}: loss", _smoothed(of_stage, "loss"), "step", "loss", 0.0))
    for key, title, label in (
        ("reward", "grpo: reward", "reward a completion"),
        ("mixed_share", "grpo: share of mixed views", "share"),
        ("kl", "grpo: KL to the SFT policy", "KL a token"),
    ):
        charts.append((title, _smoothed(of_grpo, key), "step", label, 0.0))
    for metric, title, label, span in LOOKS:
        lines = []
        for color, stage in enumerate(("sft", "grpo")):
            valid = [e for e in events if e["event"] == "valid" and e["stage"] == stage and metric in e]
            lines.append(Line(stage, [e["step"] for e in valid], [e[metric] for e in valid], color=color, dots=True))
        charts.append((f"valid: {title}", lines, "step of the stage", label, span))
    cards = [
        _card(title, line_chart(lines, x_label, y_label, span=span))
        for title, lines, x_label, y_label, span in charts
        if changes(lines, span)
    ]
    still = [title for title, lines, _, _, span in charts if not changes(lines, span)]
    left_out = f'<p class="soft">Left out, since nothing changes in them: {escape("; ".join(still))}.</p>'
    return (
        "<h2>Training</h2><p>Thin lines are single steps, thick ones their moving mean.</p>"
        f"{_cards(cards)}{left_out if still else ''}"
    )


def _smoothed(steps: Sequence[Mapping[str, Any]], key: str) -> list[Line]:
    """The values of the steps that have one, and their moving mean over a tenth of them."""
    points = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
    x, y = [step for step, _ in points], [value for _, value in points]
    width = max(len(y) // 20, 1)
    around = [y[max(i - width, 0) : i + width + 1] for i in range(len(y))]
    return [Line("", x, y, faint=True), Line("", x, [sum(part) / len(part) for part in around])]


def _filter(
    rows: Sequence[Mapping[str, Any]], context: str, found: Mapping[str, Comparison], curves: Mapping[str, Tradeoff]
) -> str:
    by_name = {row["name"]: row for row in rows}
    calibration = [
        Line(
            name,
            [point["probability"] for point in by_name[name]["filter_reliability"]],
            [point["dislike_rate"] for point in by_name[name]["filter_reliability"]],
            color=color,
            dots=True,
        )
        for color, name in enumerate(COMPARED[:2])
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
    chart = line_chart(
        trade,
        "likes withheld",
        "dislikes avoided",
        x_format=percent,
        y_format=percent,
        from_zero=True,
        diagonal=True,
    )
    said = line_chart(calibration, "predicted probability", "dislike rate", from_zero=True, diagonal=True)
    cards = [
        _card(f'Dislikes avoided against likes withheld, context "{context}"', chart),
        _card(f'Calibration, context "{context}"', said),
        _card(
            f'Withheld with the top 10 %, context "{context}"',
            _html_table("<th>of dislikes</th><th>of likes</th>", at_ten_rows),
        ),
    ]
    return (
        f"{_question(FILTER, context, rows, found)}{_row_names()}{_cards(cards)}"
        '<p class="soft">Observational: the log carries no propensities.</p>'
    )


def _costs(saved: Sequence[Savings], context: str, dislike_rate: float) -> str:
    names = list(saved[0].by_name)
    lines = []
    for at in saved:
        model = at.by_name[names[0]]
        cells = [f"{at.costs.threshold:.3f}"]
        cells += [_cell(of, "saved_per_1000", None) for of in at.by_name.values()]
        cells.append(f"{at.costs.dislike * dislike_rate * 1000:,.0f}")
        cells.append(f"{shown(model, 'dislikes_avoided_share')} / {shown(model, 'likes_withheld_share')}")
        lines.append(f"<tr><td>{at.costs.dislike:g}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    saves = "".join(f"<th>{escape(name)} saves</th>" for name in names)
    head = f"<th>withhold from P</th>{saves}<th>cost without a filter</th><th>dislikes / likes withheld %</th>"
    return (
        "<h2>What withholding saves</h2><p>Let a dislike that is shown cost as much as X likes that are withheld. With "
        "a calibrated probability it is cheapest to withhold where P(dislike) is at least 1 / (1 + X). The verdict's "
        f"probability was calibrated on valid; what it saves is counted on test; {escape(CONTEXTS[context])}. "
        f"Costs and savings are in likes withheld, per 1,000 events; the shares are those of {escape(names[0])}.</p>"
        f"{_html_table(head, lines, 'X')}"
        '<p class="soft">Other costs: <code>negfast eval RUN --cost-dislike X --cost-like Y</code>.</p>'
    )


def _strata(rows: Sequence[Stratum], context: str) -> str:
    lines = [
        f"<tr><td>{row.label}</td><td>{row.events:,}</td><td>{_three(row.filter_auc)}</td>"
        f"<td>{row.requests:,}</td><td>{_three(row.fhr20)}</td></tr>"
        for row in rows
    ]
    head = "<th>events</th><th>filter AUC</th><th>requests</th><th>FHR@20</th>"
    return (
        "<h2>By past dislikes</h2><p>How much a user's own dislikes matter to what the model knows: users by the "
        f"number of their dislikes before that. Filter: {escape(CONTEXTS[context])}.</p>{_html_table(head, lines)}"
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
    return (
        "<details><summary>Codebook usage</summary><p>Items under each code of the semantic IDs.</p>"
        f"{_cards(cards)}</details>"
    )


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
        "<details><summary>Example users</summary><p>Chosen at random among test users with at least 3 past dislikes, "
        f"half of them with a hit. Predictions that came true are marked.</p>{_cards(cards)}</details>"
    )


def _list(titles: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(title)}</li>' for title in titles)}</ul>" if titles else "<p>nothing</p>"


def _made_of(folder: RunFolder, data: Dataset) -> str:
    counts, days, split = (data.manifest[key] for key in ("counts", "days", "split"))
    config = to_toml(folder.config)
    return (
        f"<details><summary>Data and configuration</summary><p>{counts['events']:,} events of {counts['users']:,} "
        f"users on {counts['items']:,} items, {days['first']} to {days['last']}; horizon {split['horizon']} days, "
        f"valid from {split['valid']}, test from {split['test']}. negfast {negfast.__version__}.</p>"
        f"<pre>{escape(config)}</pre></details>"
    )


def _card(title: str, body: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{body}</div>'


def _cards(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; none where it is missing: a run without a step has no metrics.jsonl."""
    text = re.sub(r"\bNaN\b", "null", path.read_text()) if path.exists() else ""
    return [_json(path, line) for line in text.splitlines()]


def _json(path: Path, text: str) -> Any:
    """What ``text``, of the file ``path``, holds; InputError where it is damaged."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}") from error
