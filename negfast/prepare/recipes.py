"""Recipes of `negfast prepare`: public logs in the files their authors publish, nothing fetched.

A recipe tells which of the given files hold events and which items, what a dislike is there, and where the item text
is. What counts as a dislike is negfast's choice where the source only has ratings; ``--dislike`` overrides it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from negfast.data.dataset import Dataset, file_record
from negfast.data.items import ItemTable
from negfast.data.log import DISLIKE, EXPOSED, LIKE, WITHDRAWN, EventLog
from negfast.errors import InputError
from negfast.prepare.build import SemanticIdSettings, SplitSettings, build, check_replaceable, drop_repeats
from negfast.prepare.events import (
    EventMapping,
    Events,
    ItemMapping,
    Report,
    Selection,
    event_columns,
    index_events,
    items_of_log,
    read_items,
    select_rows,
    with_items_of,
)
from negfast.prepare.readers import BadRows, Source, encode, file_columns, join, read_table
from negfast.prepare.rules import Rule, matches, parse_rule

UNDO = {"undislike": DISLIKE, "unlike": LIKE}  # Yambda's event types that take another back


@dataclass(frozen=True)
class Recipe:
    """How one source is read."""

    about: str
    mapping: EventMapping
    items: ItemMapping | None
    is_events: Callable[[Path, Sequence[str]], bool]  # (file, its columns)
    is_items: Callable[[Path, Sequence[str]], bool]
    encoding: str = "utf-8"  # of the item file
    event_type: bool = False  # the file's name tells what its events are (Yambda's flat files)
    finish_items: Callable[[ItemTable], ItemTable] = field(default=lambda items: items)


def _rules(*rules: str) -> tuple[Rule, ...]:
    return tuple(map(parse_rule, rules))


def _has(*names: str) -> Callable[[Path, Sequence[str]], bool]:
    return lambda path, columns: set(names) <= set(columns)


def _named(*stems: str) -> Callable[[Path, Sequence[str]], bool]:
    return lambda path, columns: path.name.startswith(stems)


def _years(items: ItemTable) -> ItemTable:
    """The year at the end of a film's title as an attribute; "(no genres listed)" is no genre."""
    years = [tuple(re.findall(r"\((\d{4})\)\s*$", title)) for title in items.text]
    genres = [tuple(g for g in of_item if g != "(no genres listed)") for of_item in items.attributes["genres"]]
    return replace(items, attributes={"genres": genres, "year": years})


RECIPES: dict[str, Recipe] = {
    "kuairand": Recipe(
        "log_standard_*.csv (and log_random_*.csv) with is_hate; video_features_basic_*.csv gives tags and authors",
        EventMapping(
            dislike=_rules("is_hate==1"),
            like=_rules("is_like==1", "is_follow==1", "is_forward==1"),
            user="user_id",
            item="video_id",
            time="time_ms",
            time_unit="ms",
        ),
        ItemMapping(id="video_id", attributes=(("tag", ","), ("author_id", ""))),
        _has("user_id", "video_id", "time_ms", "is_hate"),
        _has("video_id", "author_id", "tag"),
    ),
    "yambda": Recipe(
        "flat likes, dislikes, unlikes, undislikes, listens or multi_event.parquet; undislikes take dislikes back",
        EventMapping(
            dislike=_rules("event_type==dislike"),
            like=_rules("event_type==like"),
            user="uid",
            item="item_id",
            time="timestamp",
            time_unit="s",
        ),
        None,
        _has("uid", "timestamp", "item_id"),
        lambda path, columns: False,
        event_type=True,
    ),
    "amazon-reviews-2023": Recipe(
        "CATEGORY.jsonl.gz, 1-2 stars are dislikes; meta_CATEGORY.jsonl.gz gives titles, categories and stores",
        EventMapping(
            dislike=_rules("rating<=2"),
            user="user_id",
            item="parent_asin",
            time="timestamp",
            value="rating",
            time_unit="ms",
        ),
        ItemMapping(id="parent_asin", text="title", attributes=(("categories", ""), ("store", ""))),
        _has("user_id", "parent_asin", "rating", "timestamp"),
        _has("parent_asin", "title", "main_category"),
    ),
    "movielens": Recipe(
        "ratings.csv and movies.csv; at most 2 of 5 stars is a dislike",
        EventMapping(
            dislike=_rules("rating<=2"),
            user="userId",
            item="movieId",
            time="timestamp",
            value="rating",
            time_unit="s",
        ),
        ItemMapping(id="movieId", text="title", attributes=(("genres", "|"),)),
        _has("userId", "movieId", "rating", "timestamp"),
        _has("movieId", "title", "genres"),
        finish_items=_years,
    ),
    "movielens-dat": Recipe(
        "ratings.dat and movies.dat of MovieLens 1M and 10M; at most 2 of 5 stars is a dislike",
        EventMapping(
            dislike=_rules("rating<=2"),
            value="rating",
            time_unit="s",
            columns=("user", "item", "rating", "time"),
            separator="::",
        ),
        ItemMapping(text="title", attributes=(("genres", "|"),), columns=("item", "title", "genres"), separator="::"),
        _named("ratings"),
        _named("movies"),
        encoding="latin-1",
        finish_items=_years,
    ),
    "movietweetings": Recipe(
        "ratings.dat and movies.dat; at most 5 of 10 is a dislike",
        EventMapping(
            dislike=_rules("rating<=5"),
            value="rating",
            time_unit="s",
            columns=("user", "item", "rating", "time"),
            separator="::",
        ),
        ItemMapping(text="title", attributes=(("genres", "|"),), columns=("item", "title", "genres"), separator="::"),
        _named("ratings"),
        _named("movies"),
        finish_items=_years,
    ),
}


def prepare_recipe(
    name: str,
    files: Sequence[Path],
    out: Path,
    *,
    dislike: Sequence[Rule] = (),
    split: SplitSettings,
    semantic_ids: SemanticIdSettings,
    selection: Selection | None = None,
    force: bool = False,
    described: dict[str, Any] | None = None,
    report: Report = print,
) -> Dataset:
    """Makes a data set of a public log's files; ``described`` joins the manifest. Raises InputError."""
    check_replaceable(out, force)
    events, items, undo = read_recipe(name, files, report, dislike, selection)
    if undo is not None:
        events = replace(events, log=withdraw(events.log, undo, report))
    manifest = {
        "recipe": {"name": name, "dislike": [str(rule) for rule in dislike]},
        "sources": described_files(files),
        **(described or {}),
    }
    events = drop_repeats(events, selection, report)
    return build(events, items or items_of_log(events), manifest, out, split, semantic_ids, report)


def described_files(files: Sequence[Path], first: int = 1) -> dict[str, dict[str, Any]]:
    """Names, sizes and checksums of source files, as manifests keep them, numbered from ``first``."""
    return {f"file {i}": {"name": path.name, **file_record(path)} for i, path in enumerate(files, first)}


def read_recipe(
    name: str,
    files: Sequence[Path],
    report: Report,
    dislike: Sequence[Rule] = (),
    selection: Selection | None = None,
    now: float | None = None,
    whole: bool = True,
) -> tuple[Events, ItemTable | None, np.ndarray | None]:
    """Events and item table of a source's files, in any order; items that only the log knows come last, without text.

    Where the source has events that take back others, the third is the feedback that each event takes back, uint8 [N],
    0 for most, for `withdraw`. ``dislike`` replaces the recipe's rules. Raises InputError: unknown recipe, a file that
    is neither events nor items of this source, no events, and whatever reading them raises. A log that is not ``whole``
    may lack dislikes or likes.
    """
    if name not in RECIPES:
        raise InputError(f"--recipe {name!r}: expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    event_files, item_files = _sort_files(name, recipe, files)
    mapping = replace(recipe.mapping, dislike=tuple(dislike)) if dislike else recipe.mapping
    event_files.sort(key=lambda path: _event_word(path) in UNDO)  # of equal times, what is taken back comes first
    bad = BadRows(selection is not None and selection.skip_bad_rows)
    source = join([_event_source(recipe, mapping, path, bad) for path in event_files])
    source = select_rows(source, mapping, report, bad, selection, now)
    items = None
    if item_files and recipe.items is not None:
        table = read_items(item_files[0], recipe.items, encoding=recipe.encoding)
        items = with_items_of(recipe.finish_items(table), source, mapping, report)
    item_ids = None if items is None else items.ids
    events = index_events(
        source, mapping, item_ids, report, selection, now, must_hold=dislike if whole else (), whole=whole
    )
    return events, items, _takes_back(source, mapping, item_ids, selection) if recipe.event_type else None


def withdraw(log: EventLog, takes_back: np.ndarray, report: Report) -> EventLog:
    """Gives every undo its meaning; ``takes_back`` uint8 [N] is the feedback that each event of the log takes back.

    An undo is WITHDRAWN where the pair's last like or dislike before it is of its kind, so the judgement counts until
    then and no longer; else it stays a mere exposure. What was judged of the pair on the same day before it becomes an
    exposure too: everything looks at the ends of days, where it never stood (both negfast's choice).
    """
    events = np.flatnonzero(log.judged | (takes_back > 0))
    pair = log.user[events].astype(np.int64) * log.n_items + log.item[events]
    order = np.argsort(pair, kind="stable")  # within a pair in order of time
    events, pair = events[order], pair[order]
    place, kind, judged = np.arange(len(events)), takes_back[events], log.judged[events]
    last = np.maximum.accumulate(np.where(judged, place, -1))
    first = np.searchsorted(pair, pair)
    undo = (kind > 0) & (last >= first) & (log.feedback[events[last]] == kind)
    _, of_day = np.unique(np.stack([pair, log.day[events]]), axis=1, return_inverse=True)
    last_undo = np.full(len(events), -1)
    np.maximum.at(last_undo, of_day.ravel()[undo], place[undo])
    same_day = judged & (place < last_undo[of_day.ravel()])
    feedback = log.feedback.copy()
    feedback[events[undo]], feedback[events[same_day]] = WITHDRAWN, EXPOSED
    report(f"feedback: {undo.sum():,} likes and dislikes were taken back, {same_day.sum():,} of them on their own day")
    return replace(log, feedback=feedback)


def _takes_back(
    source: Source, mapping: EventMapping, item_ids: Sequence[str] | None, selection: Selection | None
) -> np.ndarray:
    """What each event takes back, in the order of the log."""
    types = encode(source, "event_type")
    kinds = np.zeros(source.table.num_rows, np.float32)
    for word, kind in UNDO.items():
        kinds[matches(Rule("event_type", "==", word), types)] = kind
    # As the value of the events, it goes through the same sorting as they do.
    marked = replace(source, table=source.table.append_column("takes_back", pa.array(kinds)))
    as_value = replace(mapping, value="takes_back")
    value = index_events(marked, as_value, item_ids, lambda _: None, selection, whole=False).log.value
    assert value is not None
    return value.astype(np.uint8)


def _sort_files(name: str, recipe: Recipe, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    event_files: list[Path] = []
    item_files: list[Path] = []
    for path in files:
        columns = [] if recipe.mapping.columns else file_columns(path)
        if recipe.is_events(path, columns):
            event_files.append(path)
        elif recipe.is_items(path, columns):
            item_files.append(path)
        else:
            found = f"columns {', '.join(columns)}" if columns else "another name"
            raise InputError(f"{path}: found {found}, expected for --recipe {name}: {recipe.about}")
    if not event_files:
        raise InputError(f"--recipe {name}: found no events among the files, expected {recipe.about}")
    if len(item_files) > 1:
        raise InputError(f"{item_files[1]}: a second item file, expected one")
    return event_files, item_files


def _event_source(recipe: Recipe, mapping: EventMapping, path: Path, bad: BadRows) -> Source:
    columns = event_columns(mapping)
    if not recipe.event_type:
        return read_table(path, columns, names=mapping.columns, separator=mapping.separator, bad=bad)
    if "event_type" in file_columns(path):
        return read_table(path, columns, bad=bad)
    word = _event_word(path)
    if word not in ("listen", "like", "dislike", *UNDO):
        raise InputError(f"{path}: no column 'event_type', and the name is not likes, dislikes, undislikes, ...")
    source = read_table(path, [name for name in columns if name != "event_type"], bad=bad)
    return replace(source, table=source.table.append_column("event_type", pa.array([word] * source.table.num_rows)))


def _event_word(path: Path) -> str:
    """undislikes.parquet and undislikes-2025-03-01.parquet hold events of type undislike."""
    return re.split("[^a-z]", path.name, maxsplit=1)[0].removesuffix("s")
