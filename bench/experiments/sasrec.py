"""``python -m bench.experiments.sasrec --data DIR``: the settings of both SASRec rows, tried on valid.

Every entry of `GRID` is trained once on events before T_valid and looked at after some of its epochs; the number of
epochs is one of the choices. Finished entries are kept in the result file: the command goes on where it stopped.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from bench.command import Experiment
from negfast.data.dataset import Dataset
from negfast.evaluate.baselines.sasrec import KINDS, SasRec, SasRecSettings, Sequences, fit_sasrec, predict_sasrec
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.evaluate.table import evaluate_rows
from negfast.files import atomic_file

METRICS = ("FHR@20", "known_hit_dislike_share@20", "pool_hr@10", "pool_auc")
RESULT = Path(__file__).parents[1] / "results" / "sasrec_grid.json"

LOOKS = (1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40)  # epochs
GRID: list[tuple[str, dict[str, Any]]] = [
    *(("sasrec-dislikes", {"epochs": 40, "dropout": dropout}) for dropout in (0.2, 0.5)),
    *(("sasrec-dislikes", {"epochs": 20, "dropout": 0.5, "recency": weight}) for weight in (0.5, 1.0)),
    *(("sasrec-all", {"epochs": 12, "dropout": dropout}) for dropout in (0.2, 0.5)),
    *(("sasrec-all", {"epochs": 8, "dropout": 0.2, "recency": weight}) for weight in (0.5, 1.0)),
    ("sasrec-dislikes", {"epochs": 40, "dropout": 0.5, "width": 128}),
    ("sasrec-dislikes", {"epochs": 40, "dropout": 0.5, "width": 32}),
    ("sasrec-dislikes", {"epochs": 8, "dropout": 0.5, "recency": 1.0, "lr": 3e-4}),
    ("sasrec-all", {"epochs": 12, "dropout": 0.2, "width": 128}),
    ("sasrec-dislikes", {"epochs": 30, "dropout": 0.5, "recency": 0.5, "width": 32}),
    ("sasrec-dislikes", {"epochs": 20, "dropout": 0.5, "recency": 0.7}),
    ("sasrec-all", {"epochs": 12, "dropout": 0.5, "recency": 1.0, "width": 32}),
]


@click.command(cls=Experiment)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Prepared MovieTweetings.")
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
@click.option("--entries", default=len(GRID), show_default=True, help="Only the first entries of the grid.")
def main(data: Path, out: Path, entries: int) -> None:
    """Trains what the result file does not have yet."""
    dataset = Dataset.open(data)
    valid = evaluation_set(dataset.log, dataset.split(), "valid")
    tried: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    for name, changes in GRID[:entries]:
        settings = asdict(replace(SasRecSettings(), **changes))
        if any(entry["name"] == name and entry["settings"] == settings for entry in tried):
            continue
        tried.append({"name": name, "settings": settings, "valid": look(dataset, valid, name, changes)})
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps(tried, indent=1) + "\n")


def look(dataset: Dataset, valid: EvalSet, name: str, changes: dict[str, Any]) -> list[dict[str, float]]:
    """Valid figures after some epochs of one entry."""
    sequences = Sequences.of(dataset.log, KINDS[name])
    curve: list[dict[str, float]] = []

    def after_epoch(epoch: int, model: SasRec) -> None:
        if epoch in LOOKS:
            answer = predict_sasrec(dataset.log, sequences, model, valid)
            (row,) = evaluate_rows(valid, {name: answer}, resamples=1)
            curve.append({"epoch": epoch, **{metric: round(row[metric]["mean"], 4) for metric in METRICS}})
            print(name, changes, curve[-1], flush=True)

    fit_sasrec(sequences, dataset.valid_day, replace(SasRecSettings(), **changes), 0, after_epoch)
    return curve


if __name__ == "__main__":
    main()
