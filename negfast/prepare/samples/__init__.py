"""The data sets that the package carries, so that `negfast train` needs no file: MovieTweetings-100K (MIT) and Polis
conversations (CC BY 4.0, attribution to The Computational Democracy Project)."""

from pathlib import Path

from negfast.data.dataset import Dataset
from negfast.prepare.build import Report, SemanticIdSettings, SplitSettings, prepare
from negfast.prepare.events import EventMapping, ItemMapping
from negfast.prepare.recipes import prepare_recipe
from negfast.prepare.rules import parse_rule

MOVIETWEETINGS = Path(__file__).parent / "movietweetings"
POLIS = Path(__file__).parent / "polis"
SETTINGS = {"movietweetings": (), "polis": ("history.context=event",)}  # what a sample needs; most vote in one sitting


def prepare_sample(name: str, out: Path, semantic_ids: SemanticIdSettings, report: Report = print) -> Dataset:
    """Prepares the sample ``name`` of `SETTINGS`."""
    make = {"movietweetings": prepare_movietweetings, "polis": prepare_polis}[name]
    return make(out, semantic_ids=semantic_ids, report=report)


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


def prepare_polis(out: Path, *, semantic_ids: SemanticIdSettings | None = None, report: Report = print) -> Dataset:
    """Prepares 227,085 votes of 5,357 people on 2,145 statements in 11 conversations, split within conversations.

    A dislike is a disagreement, a like an agreement, a pass an exposure; text is the statement.
    """
    return prepare(
        (POLIS / "events.tsv.zst",),
        POLIS / "items.tsv.zst",
        out,
        mapping=EventMapping(dislike=(parse_rule("label==dislike"),), like=(parse_rule("label==like"),)),
        item_mapping=ItemMapping(text="text", attributes=(("conversation", ""),)),
        split=SplitSettings(within="conversation"),
        semantic_ids=semantic_ids or SemanticIdSettings(),
        report=report,
    )
