"""The data set that the package carries: MovieTweetings-100K (MIT), so that `negfast train` needs no file."""

import re
from dataclasses import replace
from pathlib import Path

from negfast.data.dataset import Dataset, file_record
from negfast.data.events import EventMapping, ItemMapping, read_events, read_items
from negfast.data.prepare import Report, SemanticIdSettings, SplitSettings, build, check_replaceable
from negfast.data.rules import parse_rule

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
    check_replaceable(out, force)
    mapping = EventMapping(
        dislike=(parse_rule("rating<=5"),),
        value="rating",
        time_unit="s",
        columns=("user", "item", "rating", "time"),
        separator="::",
    )
    item_mapping = ItemMapping(
        id="item", text="title", attributes=(("genres", "|"),), columns=("item", "title", "genres"), separator="::"
    )
    ratings, movies = MOVIETWEETINGS / "ratings.dat.zst", MOVIETWEETINGS / "movies.dat.zst"
    items = read_items(movies, item_mapping)
    years = [tuple(re.findall(r"\((\d{4})\)$", title)) for title in items.text]
    items = replace(items, attributes={**items.attributes, "year": years})
    events = read_events(ratings, mapping, items.ids, report)
    described = {
        "sample": "MovieTweetings-100K",
        "sources": {k: {"name": p.name, **file_record(p)} for k, p in (("events", ratings), ("items", movies))},
    }
    split = SplitSettings(horizon=7, valid="2013-06-17", test="2013-07-15")
    return build(events, items, described, out, split, semantic_ids or SemanticIdSettings(), report)
