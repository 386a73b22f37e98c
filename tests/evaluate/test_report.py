"""The HTML report: self-contained and well-formed, its figures those of the run, its charts within their frames."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negfast.data.dataset import Dataset
from negfast.data.log import DISLIKE, LIKE, EventLog, past_dislikes
from negfast.data.split import split_requests
from negfast.evaluate.charts import HEIGHT, WIDTH, Line, bar_chart, changes, line_chart, ticks
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.report import _best, _list, _question, _training
from negfast.evaluate.report_facts import RATIOS, SHARES, Comparison, compare, savings, tradeoff
from negfast.evaluate.sets import evaluation_set
from negfast.evaluate.table import FILTER, GENERATION, evaluate_rows
from negfast.runtime.run_folder import RunFolder
from tests.tiny import run_cli


class Balance(HTMLParser):
    """Every tag that opens is closed, in order; collects attributes that could reach outside the file."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tiny_run):
    said = run_cli("report", str(tiny_run))
    assert said.strip().endswith("report.html")
    return (tiny_run / "report.html").read_text()


def test_the_page_is_whole_and_reaches_nothing_outside(page):
    found = Balance(page)
    inside = [target.removeprefix("#") for target in found.outside]
    assert all(f'<section id="{name}">' in page for name in inside) and len(inside) == page.count("<section") >= 6
    assert "script" not in found.tags and "url(" not in page and "@import" not in page
    assert found.tags.count("svg") >= 10
    headings = (
        "Filter",
        "What withholding saves",
        "By past dislikes",
        "Matched pool",
        "Generation",
        "Training",
        "More",
    )
    assert tuple(re.findall("<h2>(.*?)</h2>", page)) == headings
    for folded in ("Codebook usage", "Example users", "Data and configuration", "What the rows are"):
        assert f"<details><summary>{folded}</summary>" in page
    left_out = re.search("nothing changes in them: (.*?)</p>", page)
    for chart in ("nats a future dislike", "expected reward", "FHR@20"):
        assert (f"<h3>valid: {chart}</h3>" in page) != (left_out is not None and chart in left_out[1])
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_its_figures_are_those_of_the_run(page, tiny_run):
    rows = {row["name"]: row for row in json.loads((tiny_run / "report.json").read_text())["rows"]}
    for section, name, metric in (
        ("filter", "boosted-plus", "filter_auc"),
        ("filter", "verdict", "filter_auc"),
        ("pool", "verdict", "pool_auc"),
        ("generation", "grpo", "FHR@20"),
        ("generation", "decay-4d", "FHR@20"),
    ):
        body = page[page.index(f'<section id="{section}">') :]
        row = body[body.index(f"<td>{name}</td>") :].split("</tr>")[0]
        assert f"{rows[name][metric]['mean']:.3f}" in re.sub(r"<small>.*?</small>|<[^>]+>", " ", row)
    assert str(tiny_run.parent) not in page  # no path of the machine


def test_the_heading_says_log_dates_and_verdict(page, tiny_run):
    heading = re.search("<h1>(.*?)</h1>", page)
    assert heading is not None
    title = heading[1]
    assert re.fullmatch(r"events\.csv: the filter is (above|below|level with) the best baselines?, [a-z, -]+", title)
    manifest = Dataset.open(RunFolder(tiny_run).data).manifest
    assert f"Test days {manifest['split']['test']} to {manifest['days']['last']}" in page


def test_the_filter_comes_first_and_each_of_its_figures_says_the_context(page):
    assert (
        page.index('<section id="filter">') < page.index('<section id="costs">') < page.index('<section id="training">')
    )
    section = page[page.index('<section id="filter">') : page.index('<section id="costs">')]
    cards = section.split('<div class="card">')[1:]
    assert len(cards) == 3 and all('context "day"' in card.replace("&quot;", '"') for card in cards)
    assert "boosted-plus" in cards[0] and "boosted-plus" in cards[1] and "boosted-plus" in cards[2]


def test_no_table_has_a_row_of_empty_cells(page):
    for section in ("filter", "pool", "generation", "costs"):
        body = page[page.index(f'<section id="{section}">') :].split("</section>")[0]
        assert "<td></td>" not in body


def test_costs_have_a_row_a_ratio(page):
    body = page[page.index('<section id="costs">') :].split("</section>")[0]
    for ratio in RATIOS:
        assert f"<tr><td>{ratio}</td><td>{1 / (1 + ratio):.3f}</td>" in body


def test_a_chart_in_which_nothing_changes_is_left_out(page):
    assert not changes([Line("", [1, 2, 3], [0.5, 0.5, float("nan")]), Line("", [1], [0.7])])
    assert not changes([Line("", [1, 2], [0.5, 0.5001])], span=0.04) and not changes([])
    assert changes([Line("", [1, 2], [0.5, 0.5]), Line("", [1, 2], [0.5, 0.6])])
    charts = page[page.index('<section id="training">') :].split("</section>")[0].split('<div class="card">')[1:]
    for chart in charts:
        lines = re.findall(r'<polyline[^>]*points="([^"]*)"', chart)
        heights = [{point.split(",")[1] for point in line.split()} for line in lines]
        assert any(len(of_line) > 1 for of_line in heights)


def test_the_filter_is_the_verdicts_and_the_lists_are_the_runs(page, tiny_run):
    """In every figure's sentence, and in no other row of the model's."""
    rows = {row["name"]: row for row in json.loads((tiny_run / "report.json").read_text())["rows"]}
    for heading, name, metric in (
        ("AUC", "verdict", "filter_auc"),
        ("HR@10", "verdict", "pool_hr@10"),
        ("FHR@20", "grpo", "FHR@20"),
    ):
        assert f"<li>{heading} {rows[name][metric]['mean']:.3f}, " in page
    for section, missing in (("filter", ("sft", "grpo")), ("pool", ("sft", "grpo")), ("generation", ("verdict",))):
        body = page[page.index(f'<section id="{section}">') :].split("</section>")[0]
        assert not any(f"<td>{name}</td>" in body for name in missing)


def test_a_row_that_is_made_from_a_sample_says_so_in_the_sections_that_show_it():
    whole = {"mean": 0.5, "low": 0.4, "high": 0.6}
    rows = [
        {"name": "knn-all", "kind": "baseline", "FHR@20": whole, "note": "counts items of 5 of 9 users <drawn>"},
        {"name": "boosted", "kind": "baseline", "filter_auc": whole, "note": "fitted to 3 of 4"},
        {"name": "grpo", "kind": "model", "FHR@20": whole},
    ]
    lists, scores = (_question(question, "day", rows, {}) for question in (GENERATION, FILTER))
    assert "knn-all: counts items of 5 of 9 users &lt;drawn&gt;</p>" in lists and "fitted to" not in lists
    assert "boosted: fitted to 3 of 4</p>" in scores and "knn-all" not in scores


def test_a_run_without_a_step_has_no_charts_of_training(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "finished"}\n')
    section = _training(RunFolder(tmp_path))
    assert "<svg" not in section and "nothing changes in them: align: loss; sft: loss; grpo: loss;" in section


def test_the_best_baseline_is_that_of_the_figure_shown(random_log):
    """A baseline ahead in the fifth digit shares its place; a difference whose interval holds zero is level."""
    log = random_log(9, n_users=50, n_items=90, n_events=3000)
    evalset = evaluation_set(log, split_requests(log, 5, 15_025, 15_042), "test")
    rng = np.random.default_rng(0)
    base = rng.random(len(evalset.filter_user)) + 0.5 * evalset.filter_dislike
    order = np.argsort(base)
    swapped = base.copy()  # one pair of neighbours, a like above a dislike, trades places: AUC by 1 / (pairs)
    place = next(k for k in range(len(order) - 1)
                 if evalset.filter_dislike[order[k]] and not evalset.filter_dislike[order[k + 1]])  # fmt: skip
    swapped[order[[place, place + 1]]] = base[order[[place + 1, place]]]

    def found(model: np.ndarray) -> Comparison:
        predictions = {
            "boosted": Predictions(filter_score=base, kind="baseline"),
            "boosted-plus": Predictions(filter_score=swapped, kind="baseline"),
            "weak": Predictions(filter_score=rng.random(len(base)), kind="baseline"),
            "verdict": Predictions(filter_score=model),
            "grpo": Predictions(generated=lists),
        }
        rows = evaluate_rows(evalset, predictions, resamples=200)
        return compare(evalset, predictions, rows, 200, 0)["filter_auc"]

    lists = np.tile(np.arange(50, dtype=np.int32), (len(evalset.requests), 1))
    same = found(swapped)
    assert same.model == "verdict"
    assert same.baselines == ["boosted-plus", "boosted"] and same.difference["mean"] == 0
    assert same.words == "level with" and _best(same) == "the best baselines, boosted-plus and boosted"
    assert found(base + 0.5 * evalset.filter_dislike).words == "above"
    assert found(base - 0.4 * evalset.filter_dislike).words == "below"


def test_savings_leave_out_what_is_no_probability(random_log):
    log = random_log(9, n_users=50, n_items=90, n_events=3000)
    evalset = evaluation_set(log, split_requests(log, 5, 15_025, 15_042), "test")
    sure = evalset.filter_dislike.astype(float)
    predictions = {
        "verdict": Predictions(filter_score=sure, filter_is_probability=True),
        "ranking": Predictions(filter_score=sure),
    }
    for at in savings(evalset, predictions, ["verdict", "ranking"], 20, 0):
        assert list(at.by_name) == ["verdict"]
        expected = 1000 * at.costs.dislike * sure.mean()  # all dislikes avoided, no like withheld
        assert at.by_name["verdict"]["saved_per_1000"]["mean"] == pytest.approx(expected, rel=1e-12)


def test_titles_are_escaped():
    assert (
        _list(["<script>alert(1)</script> & co"]) == "<ul><li>&lt;script&gt;alert(1)&lt;/script&gt; &amp; co</li></ul>"
    )


def test_tradeoff():
    dislike = np.zeros(200, bool)
    dislike[:40] = True
    perfect = tradeoff(dislike.astype(float), dislike)
    at = SHARES.tolist().index(0.2)
    assert perfect.dislikes_avoided[at] == 1 and perfect.likes_lost[at] == 0
    worst = tradeoff(-dislike.astype(float), dislike)
    assert worst.dislikes_avoided[at] == 0 and worst.likes_lost[at] == pytest.approx(40 / 160)
    assert np.all(np.diff(perfect.likes_lost) >= 0) and np.all(np.diff(worst.likes_lost) >= 0)


def test_past_dislikes():
    log = EventLog(
        np.array([0, 3, 5]), np.arange(5), np.array([DISLIKE, LIKE, DISLIKE, DISLIKE, LIKE], np.uint8),
        np.array([1, 2, 4, 3, 3]) * 86_400, None, 5,
    )  # fmt: skip
    user, moment = np.array([0, 0, 0, 1, 1]), np.array([1, 4, 5, 3, 4]) * 86_400
    assert past_dislikes(log, user, moment).tolist() == [0, 1, 2, 0, 1]


@given(low=st.floats(-1e6, 1e6), width=st.floats(0, 1e6))
def test_ticks_cover_their_range_with_few_round_steps(low, width):
    found = ticks(low, low + width)
    slack = max(abs(low), abs(low + width), 1) * 1e-6
    assert found[0] <= low + slack and found[-1] >= low + width - slack and 2 <= len(found) <= 9
    assert np.allclose(np.diff(found), found[1] - found[0], rtol=1e-3)


def test_everything_is_drawn_within_the_frame():
    x, y = list(range(5)), [0.1, 0.5, -0.2, 0.9, float("nan")]
    lines = [Line("a & b", x, y), Line("c", x, [1.0] * 5, color=1, dots=True)]
    chart = line_chart(lines, "x", "y", diagonal=True) + bar_chart(["a", "b"], [3.0, 0.0], "x", "y")
    for name, limit in (
        ("x", WIDTH),
        ("x1", WIDTH),
        ("x2", WIDTH),
        ("cx", WIDTH),
        ("y", HEIGHT),
        ("y1", HEIGHT),
        ("cy", HEIGHT),
    ):
        for value in re.findall(rf' {name}="([^"]+)"', chart):
            assert -0.01 <= float(value) <= limit + 0.01, (name, value)
    points = [tuple(map(float, p.split(","))) for line in re.findall(r'points="([^"]*)"', chart) for p in line.split()]
    assert len(points) == 4 + 5 and all(0 <= px <= WIDTH and 0 <= py <= HEIGHT for px, py in points)
    assert "a &amp; b" in chart and "nan" not in chart
    assert "nothing to show" in line_chart([Line("a", [], [])], "x", "y")
