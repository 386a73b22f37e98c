"""``python -m bench.experiments.semantic_ids``: every quantizer on MovieTweetings under both text encoders.

What can be said of semantic IDs before a model is trained on them: codes in use and perplexity by level, collisions
before one-to-one assignment, reconstruction error, and how many of an item's nearest neighbours share its prefix.
With ``--runs`` also what follows: a short training run on each quantizer's, measured on valid.
"""

import importlib.metadata
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.command import Experiment, numbers
from bench.experiments.semantic_id_runs import METRICS, downstream, short_run
from negfast.config import QUANTIZERS
from negfast.data.dataset import Dataset
from negfast.files import atomic_file
from negfast.prepare.build import SemanticIdSettings
from negfast.prepare.samples import prepare_movietweetings
from negfast.sid.build import name_items
from negfast.sid.embed import embed_items

RESULT = Path(__file__).parents[1] / "results" / "semantic_ids.json"


@click.command(cls=Experiment)
@click.option("--data", type=click.Path(path_type=Path), help="Prepared data set; the built-in MovieTweetings else.")
@click.option("--encoders", default="minilm,tfidf", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--runs", type=click.Path(path_type=Path), help="Train short runs here on the built-in MovieTweetings.")
@click.option("--quantizers", default="rq-kmeans,balanced,rq-vae,random", show_default=True, help="Of --runs.")
@click.option("--seeds", default="0", show_default=True, help="Of --runs.")
@click.option("--steps", default=150, show_default=True, help="Of SFT in --runs.")
@click.option("--align-steps", default=0, show_default=True, help="Of --runs.")
@click.option("--preset", default="quickstart", show_default=True, help="Of --runs.")
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(
    data: Path | None,
    encoders: str,
    seed: int,
    runs: Path | None,
    quantizers: str,
    seeds: str,
    steps: int,
    align_steps: int,
    preset: str,
    out: Path,
) -> None:
    """Compares the quantizers of semantic IDs."""
    with TemporaryDirectory() as folder:
        if data is None:
            settings = SemanticIdSettings(quantizer="random", encoder="tfidf")
            prepare_movietweetings(Path(folder) / "data", semantic_ids=settings, report=_quiet)
        dataset = Dataset.open(data or Path(folder) / "data")
        rows = [row for encoder in encoders.split(",") for row in rows_of(dataset, encoder, seed)]
    packages = ("negfast", "faiss-cpu", "torch", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    result: dict[str, Any] = {"versions": versions, "seed": seed, "rows": rows}
    if runs is not None:
        settings = short_run(steps, align_steps)
        result["downstream"] = downstream(quantizers.split(","), runs, settings, numbers(seeds, "--seeds"), preset)
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    show(rows)
    if runs is not None:
        show_downstream(result["downstream"])


def rows_of(dataset: Dataset, encoder: str, seed: int) -> list[dict[str, Any]]:
    """A row for each quantizer: what its report says."""
    shape = {"levels": dataset.codes.shape[1], "codebook": dataset.manifest["semantic_ids"]["codebook"]}
    embedded = embed_items(dataset.items, dataset.log, dataset.valid_day, encoder=encoder, seed=seed, report=_quiet)
    return [
        {"encoder": encoder, **name_items(embedded, {}, quantizer=name, seed=seed, report=_quiet, **shape).report}
        for name in QUANTIZERS
    ]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("encoder", "quantizer", "codes used", "perplexity", "collisions", "error", "neighbours", "seconds")
    for row in rows:
        table.add_row(
            row["encoder"],
            row["quantizer"],
            " / ".join(str(level["used"]) for level in row["level"]),
            " / ".join(str(level["perplexity"]) for level in row["level"]),
            str(row.get("collisions_before", "")),
            f"{row['error_after']:.3f}" if "error_after" in row else "",
            " / ".join(f"{share:.3f}" for share in row["neighbour_overlap"]),
            f"{row['quantize_seconds']:.1f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        "collisions: items without codes of their own before assignment, none after it; error: squared, after\n"
        "assignment, as a share of the embedding's; neighbours: share of the 10 nearest items with the same prefix of\n"
        "1, 2, ... codes; seconds: fitting and assignment on this machine, not a benchmark"
    )


def show_downstream(found: dict[str, Any]) -> None:
    table = Table("quantizer", *METRICS)
    for row in found["rows"]:
        table.add_row(row["quantizer"], *(f"{row[metric]['mean']:.4f}" for metric in METRICS))
    table.add_section()
    first = found["rows"][0]["quantizer"]
    for row in found["rows"][1:]:
        mine = {d["metric"]: d for d in found["differences"] if d["a"] == row["quantizer"]}
        cells = (f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" for d in map(mine.__getitem__, METRICS))
        table.add_row(f"{row['quantizer']} - {first}", *cells)
    console = Console(width=160)
    console.print(table)
    console.print("on valid; intervals over its users, the same resamples for all; nll: nats of a future dislike")


def _quiet(_: str) -> None:
    pass


if __name__ == "__main__":
    main()
