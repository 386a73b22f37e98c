"""The data set that the package carries: MovieTweetings-100K (MIT), so that `negfast train` needs no file."""

from pathlib import Path

from negfast.data.dataset import Dataset
from negfast.prepare.build import Report, SemanticIdSettings, SplitSettings
from negfast.prepare.recipes import prepare_recipe

MOVIETWEETINGS = Path(__file__).parent / "movietweetings"


def prepare_movietweetings(
    out: Path,
    *,
    semantic_ids: SemanticIdSettings | None = None,
    force: bool = False,
    report: Report = print,
) -> Dataset:
    """Prepares the 100,000 ratings of 2013-02-28 to 2013-09-01 with the dates of the design.

    A dislike is a rating of at most 5 of 10; text is the title, attributes are genres and the year.
    """
    return prepare_recipe(
        "movietweetings",
        [MOVIETWEETINGS / "ratings.dat.zst", MOVIETWEETINGS / "movies.dat.zst"],
        out,
        split=SplitSettings(horizon=7, valid="2013-06-17", test="2013-07-15"),
        semantic_ids=semantic_ids or SemanticIdSettings(),
        force=force,
        described={"sample": "MovieTweetings-100K"},
        report=report,
    )
