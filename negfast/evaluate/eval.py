"""`negfast eval`: a finished run's rows beside the baselines on one split."""

import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from negfast.data.dataset import Dataset, date_of
from negfast.data.log import EventLog
from negfast.data.neighbours import soft_similarity
from negfast.data.split import Requests
from negfast.errors import InputError
from negfast.evaluate.baselines import baseline_predictions, thresholds
from negfast.evaluate.baselines.rates import rate_predictions
from negfast.evaluate.metrics import Costs, Similarity
from negfast.evaluate.predictions import TOP, Predictions, check_generated, verdict_predictions
from negfast.evaluate.sets import EvalSet, SetColumns, engine_set, set_columns
from negfast.evaluate.table import evaluate_rows, evaluation, print_table
from negfast.files import atomic_file
from negfast.runtime.checkpoint import load_weights
from negfast.runtime.engine import Engine, history_features
from negfast.runtime.generation import generate
from negfast.runtime.run_folder import RunFolder


def evaluate_run(
    run: Path,
    split: str,
    data: Path | None,
    all_baselines: bool = False,
    cost_dislike: float | None = None,
    cost_like: float | None = None,
) -> dict[str, Any]:
    """The `evaluation` of ``split`` ("valid" or "test"). InputError for an unfinished run.

    ``all_baselines`` adds SASRec, which has to be trained and takes minutes. ``cost_dislike`` and ``cost_like`` go
    together and add what a filter at their threshold saves (`Costs`).
    """
    costs = read_costs(cost_dislike, cost_like)
    return evaluation(*evaluate_folder(RunFolder(run), split, data, all_baselines, costs), costs)


def read_costs(dislike: float | None, like: float | None) -> Costs | None:
    """The costs as given; None where none is. InputError where one is missing, or not a number above 0."""
    if dislike is None and like is None:
        return None
    for option, value in (("--cost-dislike", dislike), ("--cost-like", like)):
        if value is None or not 0 < value < math.inf:
            found = "found nothing" if value is None else f"found {value:g}"
            raise InputError(f"{option}: {found}, expected a number above 0; the two costs go together")
    assert dislike is not None and like is not None
    return Costs(dislike, like)


def evaluate_folder(
    run: RunFolder, split: str, data: Path | None, all_baselines: bool = False, costs: Costs | None = None
) -> tuple[EvalSet, list[dict[str, Any]]]:
    """The rows of every baseline and those of `model_predictions`."""
    engine = run.finished_engine(data)
    check_unseen(run, engine, split)
    sets = {name: engine_set(engine, name) for name in ("valid", "test")}
    evalset = sets[split]
    predictions, columns = baselines_of(engine, sets, split, all_baselines)
    predictions |= model_predictions(run, engine, evalset, columns)
    check_predictions(engine.log, evalset, predictions)
    resamples, seed = engine.config.eval.resamples, engine.config.train.seed
    rows = evaluate_rows(evalset, predictions, similarity_of(engine), resamples, seed, costs)
    return evalset, rows


def check_unseen(run: RunFolder, engine: Engine, split: str) -> None:
    """InputError where the run learned from events of ``split``."""
    start = {"valid": engine.split.valid_day, "test": engine.split.test_day}[split]
    if start < run.learned_until:
        until = date_of(run.learned_until)
        raise InputError(
            f"{run.path}: learned from events before {until}, so {split}, from {date_of(start)} on, cannot measure it"
        )


def baselines_of(
    engine: Engine, sets: dict[str, EvalSet], split: str, trained: bool
) -> tuple[dict[str, Predictions], SetColumns]:
    """The baselines' predictions for ``split``, fitted to the same events as the engine's policy, and the features of
    its questions.

    Thresholds are chosen on valid, by a fit that ends before it; ``trained`` as for `baseline_predictions`.
    """
    _say("baselines")
    features, frozen = engine.features, engine.data.valid_day
    if engine.fit_until == frozen:
        both = [evalset if name == split else evalset.of_filter() for name, evalset in sets.items()]
        columns, place = set_columns(features, both), list(sets).index(split)
        return baseline_predictions(features, both, columns, frozen, trained=trained)[place], columns[place]
    of_frozen, valid = history_features(engine.data, frozen, features.context), [sets["valid"].of_filter()]
    chosen = thresholds(rate_predictions(of_frozen, valid, set_columns(of_frozen, valid), frozen)[0])
    columns = set_columns(features, [sets[split]])
    fitted = baseline_predictions(features, [sets[split]], columns, engine.fit_until, trained=trained)[0]
    return {name: replace(made, filter_threshold=chosen.get(name)) for name, made in fitted.items()}, columns[0]


def model_predictions(run: RunFolder, engine: Engine, evalset: EvalSet, columns: SetColumns) -> dict[str, Predictions]:
    """Lists of `prior`, scores of the run's `verdict`, lists of its `sft` and `grpo` weights. ``engine`` comes with the
    final weights and is left with those of a stage, whose verdict is not fitted."""
    _say("prior")
    predictions = {"prior": Predictions(generated=generate(engine, evalset.requests, TOP, with_policy=False)[0])}
    _say("verdict")
    predictions["verdict"] = verdict_predictions(engine.policy.verdict, evalset, columns, run.calibration)
    for name in ("sft", "grpo"):
        _say(name)
        load_weights(run.checkpoints / name, engine.policy)
        predictions[name] = Predictions(generated=generate(engine, evalset.requests, TOP)[0])
    return predictions


def check_predictions(log: EventLog, evalset: EvalSet, predictions: dict[str, Predictions]) -> None:
    """ValueError where an item was generated that is not admissible, see `check_generated`."""
    for predicted in predictions.values():
        if predicted.generated is not None:
            check_generated(log, evalset.requests, predicted.generated)


def write_report(run: RunFolder, evalset: EvalSet, rows: list[dict[str, Any]]) -> None:
    """RUN/report.md and RUN/report.json, which keeps the fingerprint of the data that the table was made on."""
    found, text = evaluation(evalset, rows), StringIO()
    with redirect_stdout(text):
        print_table(found)
    with atomic_file(run.path / "report.json") as temporary:
        table = found | {"fingerprint": Dataset.open(run.data).fingerprint}
        temporary.write_text(json.dumps(table, allow_nan=False) + "\n")
    with atomic_file(run.report) as temporary:
        tables = f"# {run.path.name}: {evalset.name} split\n\n```\n{text.getvalue()}```\n"
        temporary.write_text(tables + alignment_section(run))


def alignment_section(run: RunFolder) -> str:
    """Accuracy of the alignment tasks on held-out items, as Markdown; "" where the stage logged none."""
    found: dict[str, float] = {}
    for line in (run.path / "events.jsonl").read_text().splitlines():
        if '"outcome"' in line and '"align"' in line:
            found = {key: value for key, value in json.loads(line).items() if key not in ("event", "stage")}
    if not found:
        return ""
    rows = "".join(f"| {name} | {value:.3f} |\n" for name, value in found.items())
    return f"\n## Alignment, on held-out items\n\n| task, figure | |\n|---|---|\n{rows}"


def similarity_of(engine: Engine) -> Similarity:
    """s_u(i, j) of the soft metrics: co-dislikes of other users before T_valid, else content."""

    def similarity(requests: Requests, generated: np.ndarray) -> np.ndarray:
        return soft_similarity(
            engine.co_dislikes, engine.content, requests.user, generated, requests.dislike_offsets, requests.dislikes
        )

    return similarity


def _say(row: str) -> None:
    print(f"evaluating {row}", file=sys.stderr, flush=True)
