"""The Python API: `load` a run and ask it, or `prepare`, `train`, `evaluate` and `export` as the commands do.

What the command line refuses, these refuse too: `InputError` has the message of the command.
"""

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from negfast.errors import InputError
from negfast.serve.context import Moment
from negfast.serve.run import Column, Given, Run
from negfast.serve.score import Scores

__all__ = ["Column", "Given", "InputError", "Moment", "Run", "Scores", "evaluate", "export", "load", "prepare", "train"]

AnyPath = str | os.PathLike[str]
FLAGS = {"overrides": "--set", "first_day": "--from", "last_day": "--until"}  # of options with another name


def load(run: AnyPath, data: AnyPath | None = None) -> Run:
    """Opens a finished run over ``data``, by default the data set that it was trained on. Nothing trains.

    Raises `InputError` where there is no run, it is unfinished or damaged, or the data does not belong to it.
    """
    opened = Run(Path(run), _path(data))
    _ = opened._engine
    return opened


def prepare(
    files: AnyPath | Sequence[AnyPath],
    out: AnyPath,
    *,
    force: bool = False,
    recipe: str | None = None,
    like: AnyPath | None = None,
    items: AnyPath | None = None,
    user_column: str = "user",
    item_column: str = "item",
    time_column: str = "time",
    value_column: str | None = None,
    time_unit: str = "auto",
    dislike: str | Sequence[str] = (),
    like_rule: str | Sequence[str] = (),
    rest: str = "like",
    first_day: str | None = None,
    last_day: str | None = None,
    skip_bad_rows: bool = False,
    drop_repeats: bool = False,
    columns: str | Sequence[str] | None = None,
    separator: str | None = None,
    item_id_column: str = "item",
    item_text_column: str | None = None,
    item_attributes: str | Sequence[str] = (),
    item_embedding: AnyPath | None = None,
    item_columns: str | Sequence[str] | None = None,
    item_separator: str | None = None,
    horizon: int = 7,
    valid: str | None = None,
    test: str | None = None,
    split_within: str | None = None,
    levels: int | None = None,
    codebook: int | None = None,
    quantizer: str = "rq-kmeans",
    encoder: str = "auto",
    seed: int = 0,
    memory: str | int | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Makes the data set ``out`` of an event log, in one file or several, or directories of files.

    Options are those of `negfast prepare` (``negfast prepare --help``): ``dislike`` a rule such as "rating<=2" or
    several, ``like_rule`` and ``item_attributes`` likewise; ``columns`` and ``item_columns`` names, or one string with
    commas between them; ``first_day`` and ``last_day`` are its ``--from`` and ``--until``, ISO dates; ``memory`` bytes,
    or a string like "4GB". ``report`` is called with each line on how the log was read.

    Returns what ``negfast prepare --json`` prints: counts, days, split, semantic IDs, what was left out, warnings.
    Raises `InputError` for files or options that cannot do; nothing is left then.
    """
    given = dict(locals())
    from negfast.data.dataset import Dataset
    from negfast.files import locked
    from negfast.memory import parse_bytes
    from negfast.prepare.build import SemanticIdSettings, SplitSettings, check_date, summary
    from negfast.prepare.build import prepare as prepare_dataset
    from negfast.prepare.events import EventMapping, ItemMapping, Selection, with_attributes
    from negfast.prepare.rules import parse_rule

    paths, folder = [Path(file) for file in _several(files)], Path(out)
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if report is not None:
            report(line)

    selection = Selection(skip_bad_rows, drop_repeats, check_date("--from", first_day), check_date("--until", last_day))
    if split_within is not None and (valid or test):
        raise InputError("--split-within: expected neither --valid nor --test beside it")
    split = SplitSettings(horizon, valid, test, split_within)
    semantic_ids = SemanticIdSettings(levels, codebook, quantizer, encoder, seed)
    size = parse_bytes("--memory", memory) if isinstance(memory, str) else memory
    dislikes = tuple(map(parse_rule, _several(dislike)))
    refuse_unused_of_prepare(_changed(prepare, given))
    with locked(folder):
        if like is not None:
            from negfast.prepare.daily import prepare_like

            data: Dataset = prepare_like(
                paths, Path(like), folder, items_path=_path(items), split=(valid, test), selection=selection,
                force=force, report=tell,
            )  # fmt: skip
        elif recipe is not None:
            from negfast.prepare.recipes import prepare_recipe

            data = prepare_recipe(
                recipe, paths, folder, dislike=dislikes, split=split, semantic_ids=semantic_ids, selection=selection,
                force=force, memory=size, report=tell,
            )  # fmt: skip
        else:
            if not dislikes:
                raise InputError("Missing option '--dislike' (or --recipe, or --like).")
            item_mapping = ItemMapping(
                id=item_id_column,
                text=item_text_column,
                columns=_names(item_columns),
                separator=_separator(item_separator),
            )
            data = prepare_dataset(
                paths,
                _path(items),
                folder,
                mapping=EventMapping(
                    dislike=dislikes,
                    like=tuple(map(parse_rule, _several(like_rule))),
                    rest=rest,
                    user=user_column,
                    item=item_column,
                    time=time_column,
                    value=value_column,
                    time_unit=time_unit,
                    columns=_names(columns),
                    separator=_separator(separator),
                ),
                item_mapping=with_attributes(item_mapping, Path(items or ""), _several(item_attributes)),
                item_embedding=_path(item_embedding),
                split=split,
                semantic_ids=semantic_ids,
                selection=selection,
                force=force,
                memory=size,
                report=tell,
            )
    return summary(data, selection, said)


def train(
    config: AnyPath | None = None,
    *,
    preset: str | None = None,
    data: AnyPath | None = None,
    sample: str | None = None,
    model: AnyPath | None = None,
    init: AnyPath | None = None,
    out: AnyPath | None = None,
    overrides: Sequence[str] = (),
    refit: AnyPath | None = None,
    whole_log: bool = False,
) -> Run:
    """Trains a run, or resumes one that is unfinished, and returns it: align, sft, grpo, then the table on test.

    Options are those of `negfast train` (``negfast train --help``): ``config`` a TOML file, ``preset`` "quickstart",
    "smoke" or "nightly", ``sample`` "movietweetings" or "polis", ``overrides`` its ``--set``, such as
    ("grpo.steps=500",); with ``refit`` a finished run is trained again on later events. Says on stdout and stderr how
    far it is, as the command does. Processes that torchrun started train together. Raises `InputError` for options or
    data that cannot do, `negfast.errors.TrainingError` where training fails.
    """
    refuse_unused_of_train(_changed(train, dict(locals())))
    if refit is not None:
        from negfast.runtime.run_folder import RunFolder
        from negfast.train.run import refit as train_again

        return Run(train_again(RunFolder(Path(refit).resolve()), _path(out), whole_log).path)
    if whole_log:
        raise InputError("--whole-log: expected --refit RUN beside it")
    from negfast.train.run import train as run
    from negfast.train.start import TrainOptions

    paths = {"config": config, "data": data, "model": model, "init": init, "out": out}
    options = TrainOptions(
        **{name: _path(path) for name, path in paths.items()}, preset=preset, overrides=tuple(overrides), sample=sample
    )
    return Run(run(options).path)


def evaluate(
    run: AnyPath,
    *,
    split: str = "test",
    data: AnyPath | None = None,
    all_baselines: bool = False,
    cost_dislike: float | None = None,
    cost_like: float | None = None,
) -> dict[str, Any]:
    """Measures a finished run beside the baselines on ``split``, "valid" or "test".

    Options are those of `negfast eval` (``negfast eval --help``). Returns what ``negfast eval --json`` prints: sizes of
    the split, and ``rows``, one for each predictor with its metrics as {"mean", "low", "high"}, a 95 % interval. Takes
    minutes, and says on stderr what it is at. Raises `InputError` for an unfinished run, and where it has learned from
    the split.
    """
    from negfast.evaluate.eval import evaluate_run

    if split not in ("valid", "test"):
        raise InputError(f"split: found {split!r}, expected valid or test")
    return evaluate_run(
        Path(run),
        split=split,
        data=_path(data),
        all_baselines=all_baselines,
        cost_dislike=cost_dislike,
        cost_like=cost_like,
    )


def export(run: AnyPath, out: AnyPath) -> None:
    """Writes a finished run to the directory ``out`` for transformers and vLLM, with all that its lists and scores need
    (docs/serving.md); an export that is there is replaced.

    Raises `InputError` for an unfinished run, one with ``history.text``, and where ``out`` is something else.
    """
    from negfast.serve.export import export_run

    export_run(Path(run), out=Path(out))


def refuse_unused_of_prepare(given: Collection[str]) -> None:
    """InputError where one of the options ``given`` of `prepare` would do nothing beside another."""
    of_rows = {"files", "out", "report", "force", "valid", "test", "first_day", "last_day", "skip_bad_rows"}
    of_rows |= {"drop_repeats"}
    of_ids = {"levels", "codebook", "quantizer", "encoder", "seed"}
    if "like" in given:
        refuse(given, of_rows | {"like", "items"}, "beside --like, which settles it")
    elif "recipe" in given:
        allowed = of_rows | of_ids | {"recipe", "dislike", "horizon", "memory"}
        refuse(given, allowed, "beside --recipe, which settles it")
    elif "items" not in given:
        of_items = {name for name in given if name.startswith("item_")} - {"item_column", "item_embedding"}
        refuse(of_items, (), "without --items")
    if "like_rule" in given:
        refuse({"rest"} & set(given), (), "beside --like-rule: events of no rule are exposures then")


def refuse_unused_of_train(given: Collection[str]) -> None:
    """InputError where one of the options ``given`` of `train` would do nothing beside another."""
    if "refit" in given:
        refuse(given, {"refit", "whole_log", "out"}, "beside --refit, which settles it")


def refuse(given: Collection[str], allowed: Collection[str], why: str) -> None:
    """InputError for one of the options ``given`` that is not ``allowed``."""
    for name in sorted(set(given) - set(allowed)):
        raise InputError(f"{FLAGS.get(name, '--' + name.replace('_', '-'))} has no place {why}")


def _changed(function: Callable[..., Any], given: Mapping[str, Any]) -> set[str]:
    """The options that were given something other than their default, be it as a list."""
    parameters = inspect.signature(function).parameters
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return {name for name, value in plain.items() if value != parameters[name].default}


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)


def _several(one_or_more: Any) -> tuple[Any, ...]:
    return (one_or_more,) if isinstance(one_or_more, str | os.PathLike) else tuple(one_or_more)


def _names(names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    return tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))


def _separator(text: str | None) -> str | None:
    return None if text is None else text.replace("\\t", "\t")
