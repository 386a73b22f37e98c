"""`negfast eval`: what is asked on the command line."""

import json

import pytest

from tests.tiny import run_cli


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--cost-dislike", "5"], "--cost-like: found nothing, expected a number above 0"),
        (["--cost-like", "1"], "--cost-dislike: found nothing, expected a number above 0"),
        (["--cost-dislike", "0", "--cost-like", "1"], "--cost-dislike: found 0, expected a number above 0"),
        (["--cost-dislike", "5", "--cost-like", "nan"], "--cost-like: found nan, expected a number above 0"),
        (["--cost-dislike", "inf", "--cost-like", "1"], "--cost-dislike: found inf, expected a number above 0"),
    ],
)
def test_costs_go_together_and_are_above_zero(tmp_path, given, said):
    assert said in run_cli("eval", str(tmp_path), *given, code=2)


def test_costs_on_the_command_line(tiny_run):
    output = run_cli("eval", str(tiny_run), "--cost-dislike", "4", "--cost-like", "1", "--json")
    found = json.loads(output[output.index("{") :])
    assert found["costs"] == {"dislike": 4.0, "like": 1.0, "threshold": 0.2}
    rows = {row["name"]: row for row in found["rows"]}
    for name in ("boosted-plus", "verdict"):
        saved = rows[name]["saved_per_1000"]
        assert saved["low"] <= saved["mean"] <= saved["high"]
    assert all("saved_per_1000" not in rows[name] for name in ("popularity", "sft", "grpo"))
    plain = json.loads((tiny_run / "report.json").read_text())["rows"]
    assert [{key: row[key] for key in old} for row, old in zip(found["rows"], plain, strict=True)] == plain
