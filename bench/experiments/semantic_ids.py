"""``python -m bench.experiments.semantic_ids``: every quantizer on MovieTweetings under both text encoders.

What can be said of semantic IDs before a model is trained on them: codes in use and perplexity by level, collisions
before one-to-one assignment, reconstruction error, and how many of an item's nearest neighbours share its prefix.
"""

import importlib.metadata
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from negfast.data.dataset import Dataset
from negfast.data.prepare import SemanticIdSettings
from negfast.data.samples import prepare_movietweetings
from negfast.files import atomic_file
from negfast.sid.build import QUANTIZERS, name_items
from negfast.sid.embed import embed_items

RESULT = Path(__file__).parents[1] / "results" / "semantic_ids.json"


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Prepared data set; the built-in MovieTweetings else.")
@click.option("--encoders", default="minilm,tfidf", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(data: Path | None, encoders: str, seed: int, out: Path) -> None:
    """Compares the quantizers of semantic IDs."""
    with TemporaryDirectory() as folder:
        if data is None:
            settings = SemanticIdSettings(quantizer="random", encoder="tfidf")
            prepare_movietweetings(Path(folder) / "data", semantic_ids=settings, report=_quiet)
        dataset = Dataset.open(data or Path(folder) / "data")
        rows = [row for encoder in encoders.split(",") for row in rows_of(dataset, encoder, seed)]
    packages = ("negfast", "faiss-cpu", "torch", "numpy")
    result = {"versions": {name: importlib.metadata.version(name) for name in packages}, "seed": seed, "rows": rows}
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    show(rows)


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


def _quiet(_: str) -> None:
    pass


if __name__ == "__main__":
    main()
