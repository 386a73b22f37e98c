"""Bad input of experiments: one line on stderr and exit code 2."""

from typing import Any

import click

from negfast.errors import InputError


class Refused(click.ClickException):
    exit_code = 2


class Experiment(click.Command):
    """A command that refuses bad input in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise Refused(str(error)) from error


def numbers(text: str, option: str) -> list[int]:
    """Comma-separated whole numbers. InputError where they are none."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: found {text!r}, expected whole numbers with commas between them") from None
