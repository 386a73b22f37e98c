"""``python -m bench NAME [--json] [--option value ...]``: runs bench/NAME.py and writes bench/results/NAME.json.

The options of a benchmark are the parameters of its ``run``; with ``--json`` its table goes to stderr and the result
alone to stdout.
"""

import contextlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import write_result
from negfast.errors import InputError

RESULTS = Path(__file__).parent / "results"
YES_NO = {"yes": True, "no": False}


def main(arguments: list[str]) -> int:
    names = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\ndef run(" in p.read_text("utf-8"))
    if not arguments or arguments[0] not in names:
        print(f"usage: python -m bench {{{','.join(names)}}} [--json] [--option value ...]", file=sys.stderr)
        return 2
    name, rest = arguments[0], arguments[1:]
    as_json = "--json" in rest
    run = importlib.import_module(f"bench.{name}").run
    try:
        options = parse_options(run, [argument for argument in rest if argument != "--json"])
    except ValueError as error:
        print(f"bench {name}: {error}", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    if "out" in inspect.signature(run).parameters:
        options.setdefault("out", RESULTS / f"{name}.json")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        try:
            result = run(**options)
        except InputError as error:
            print(f"bench {name}: {error}", file=sys.stderr)
            return 2
    if "out" not in options:
        write_result(RESULTS / f"{name}.json", result)
    if as_json:
        print(json.dumps(result))
    return 0


def parse_options(run: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """``--key value`` pairs as arguments of ``run``, in the types of its defaults; ValueError where they do not fit."""
    parameters = inspect.signature(run).parameters
    options: dict[str, Any] = {}
    for flag, value in zip(arguments[::2], [*arguments[1::2], None][: len(arguments[::2])], strict=True):
        key = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or key not in parameters:
            known = ", ".join(f"--{name.replace('_', '-')}" for name in parameters)
            raise ValueError(f"found {flag}, expected one of {known}")
        if value is None:
            raise ValueError(f"{flag}: found no value")
        default = parameters[key].default
        kind = Path if default is None else type(default)
        if kind is bool:
            if value not in YES_NO:
                raise ValueError(f"{flag}: found {value!r}, expected yes or no")
            options[key] = YES_NO[value]
            continue
        try:
            options[key] = kind(value)
        except ValueError:
            raise ValueError(f"{flag}: found {value!r}, expected {kind.__name__}") from None
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
