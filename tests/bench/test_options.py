"""Options of ``python -m bench``: the types of a benchmark's defaults, and one line for what does not fit."""

from pathlib import Path

import pytest

from bench.__main__ import main, parse_options


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
def test_what_does_not_fit_is_told(arguments, message):
    with pytest.raises(ValueError) as error:
        parse_options(bench, arguments)
    assert str(error.value) == message


def test_the_command_exits_with_2(capsys):
    assert main(["quality", "--long", "maybe"]) == 2
    assert capsys.readouterr().err == "bench quality: --long: found 'maybe', expected yes or no\n"
    assert main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m bench {")
