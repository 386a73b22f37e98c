"""Options of ``python -m bench``: the types of a benchmark's defaults, and one line for what does not fit."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main, parse_options
from bench.experiments.simulator import main as simulator


def bench(
    out: Path | None = None, seeds: str = "0", repeats: int = 5, share: float = 0.5, long: bool = True
) -> None: ...


def test_options_have_the_types_of_the_defaults():
    arguments = ["--out", "a.json", "--seeds", "0,1", "--repeats", "3", "--share", "1", "--long", "no"]
    found = parse_options(bench, arguments)
    assert found == {"out": Path("a.json"), "seeds": "0,1", "repeats": 3, "share": 1.0, "long": False}
    assert type(found["share"]) is float


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--lonk", "no"], "found --lonk, expected one of --out, --seeds, --repeats, --share, --long"),
        (["--repeats"], "--repeats: found no value"),
        (["--repeats", "many"], "--repeats: found 'many', expected int"),
        (["--long", "maybe"], "--long: found 'maybe', expected yes or no"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        parse_options(bench, arguments)
    assert str(error.value) == message


def test_an_experiment_exits_with_2_in_a_line(tmp_path):
    found = CliRunner().invoke(simulator, ["--seeds", "x", "--out", str(tmp_path / "out.json")])
    assert found.exit_code == 2 and not (tmp_path / "out.json").exists()
    assert found.output == "Error: --seeds: found 'x', expected whole numbers with commas between them\n"


def test_the_command_exits_with_2(capsys):
    assert main(["quality", "--sasrec", "maybe"]) == 2
    assert capsys.readouterr().err == "bench quality: --sasrec: found 'maybe', expected yes or no\n"
    assert main(["quality", "--seeds", "0,one"]) == 2
    assert "--seeds: found '0,one', expected whole numbers" in capsys.readouterr().err
    assert main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m bench {")
