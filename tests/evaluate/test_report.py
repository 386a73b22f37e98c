"""The HTML report: self-contained and well-formed, its figures those of the run, its charts within their frames."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negfast.data.log import DISLIKE, LIKE, EventLog, past_dislikes
from negfast.evaluate.charts import HEIGHT, WIDTH, Line, bar_chart, line_chart, ticks
from negfast.evaluate.report import _list
from negfast.evaluate.report_facts import SHARES, tradeoff
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
    assert found.outside == [] and "script" not in found.tags and "url(" not in page and "@import" not in page
    assert found.tags.count("svg") >= 10
    for heading in ("Beside the baselines", "Training", "As a filter", "By the number of past dislikes",
                    "Codebook usage", "Example users", "What it was made of"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    for chart in ("nats a future dislike", "expected reward", "FHR@20", "filter AUC"):  # what chooses weights, too
        assert f"<h3>valid: {chart}</h3>" in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_its_figures_are_those_of_the_run(page, tiny_run):
    rows = {row["name"]: row for row in json.loads((tiny_run / "report.json").read_text())["rows"]}
    body = page[page.index("<tbody>") :]
    for name, metric in (("boosted", "filter_auc"), ("grpo", "filter_auc"), ("grpo", "FHR@20"), ("decay-4d", "FHR@20")):
        row = body[body.index(f"<td>{name}</td>") :].split("</tr>")[0]
        assert f"{rows[name][metric]['mean']:.3f}" in re.sub(r"<small>.*?</small>|<[^>]+>", " ", row)
    assert str(tiny_run.parent) not in page  # no path of the machine


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
    user, day = np.array([0, 0, 0, 1, 1]), np.array([0, 3, 4, 2, 3])
    assert past_dislikes(log, user, day).tolist() == [0, 1, 2, 0, 1]


@given(low=st.floats(-1e6, 1e6), width=st.floats(0, 1e6))
def test_ticks_cover_their_range_with_few_round_steps(low, width):
    found = ticks(low, low + width)
    slack = max(abs(low), abs(low + width), 1) * 1e-6
    assert found[0] <= low + slack and found[-1] >= low + width - slack and 2 <= len(found) <= 9
    assert np.allclose(np.diff(found), found[1] - found[0], rtol=1e-3)


def test_everything_is_drawn_within_the_frame():
    x, y = list(range(5)), [0.1, 0.5, -0.2, 0.9, float("nan")]
    chart = line_chart([Line("a & b", x, y, [v - 0.3 for v in y[:4]] + [0.0], [v + 0.3 for v in y[:4]] + [0.0]),
                        Line("c", x, [1.0] * 5, color=1, dots=True)], "x", "y", diagonal=True)  # fmt: skip
    chart += bar_chart(["a", "b"], [3.0, 0.0], "x", "y", show=1)
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
