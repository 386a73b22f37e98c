"""Runs that benchmarks and experiments train once and find again."""

from pathlib import Path

from negfast.config import load_config
from negfast.errors import InputError
from negfast.run_folder import RunFolder
from negfast.train.run import train


def trained(
    out: Path, config: Path | None, preset: str | None, data: Path | None, overrides: tuple[str, ...]
) -> RunFolder:
    """The finished run ``out`` with these settings; trained, or trained on, where it is not there yet.

    The test split is left alone. InputError where ``out`` has other settings.
    """
    run = RunFolder(out)
    if not run.final.is_dir():
        train(config=config, preset=preset, data=data, model=None, init=None, out=out, overrides=overrides, table=False)
    elif run.config != load_config(config, preset, overrides):
        raise InputError(f"{out}: was trained with other settings than asked for; see its config.toml")
    return run


def data_of(runs: list[RunFolder]) -> Path | None:
    """The data set of the first run, for the others; None before there is one, which has the embedded one prepared."""
    return runs[0].data if runs else None
