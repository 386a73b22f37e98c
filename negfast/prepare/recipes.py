"""Recipes of `negfast prepare`: public logs in the files their authors publish, nothing fetched.

A recipe tells which of the given files hold events and which items, what a dislike is there, and where the item text
is. What counts as a dislike is negfast's choice where the source only has ratings; ``--dislike`` overrides it.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from negfast.data.dataset import Dataset, file_record
from negfast.data.items import ItemTable
from negfast.data.log import DISLIKE, EXPOSED, LIKE, WITHDRAWN, EventLog
from negfast.errors import InputError
from negfast.prepare.build import SemanticIdSettings, SplitSettings, build, check_replaceable
from negfast.prepare.events import EventMapping, Events, ItemMapping, Report, Selection, event_columns, read_items
from negfast.prepare.readers import BadRows, Source, encode, file_columns, read_blocks
from negfast.prepare.reading import LogReader, ReadFile, log_files, read_file, scratch_sorter, sort_log
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
    "polis": Recipe(
        "votes.csv and comments.csv of a conversation's export; -1 (disagree) is a dislike, 0 (pass) an exposure",
        EventMapping(
            dislike=_rules("vote==-1"),
            like=_rules("vote==1"),
            user="voter-id",
            item="comment-id",
            time="timestamp",
            time_unit="s",
        ),
        ItemMapping(id="comment-id", text="comment-body"),
        _has("timestamp", "comment-id", "voter-id", "vote"),
        _has("comment-id", "comment-body"),
    ),
    "community-notes": Recipe(
        "ratings-*.tsv and notes-*.tsv of X's downloads; NOT_HELPFUL is a dislike, SOMEWHAT_HELPFUL an exposure",
        EventMapping(
            dislike=_rules("helpfulnessLevel==NOT_HELPFUL"),
            like=_rules("helpfulnessLevel==HELPFUL"),
            user="raterParticipantId",
            item="noteId",
            time="createdAtMillis",
            time_unit="ms",
        ),
        ItemMapping(id="noteId", text="summary", attributes=(("classification", ""),)),
        _has("noteId", "raterParticipantId", "createdAtMillis", "helpfulnessLevel"),
        _has("noteId", "summary", "classification"),
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
    memory: int | None = None,
    described: dict[str, Any] | None = None,
    report: Report = print,
) -> Dataset:
    """Makes a data set of a public log's files; ``described`` joins the manifest, ``memory`` as for
    `negfast.prepare.build.prepare`. Raises InputError."""
    check_replaceable(out, force)
    files = log_files(files)
    reader, items = recipe_reader(name, files, report, dislike, selection)
    manifest = {"recipe": {"name": name, "dislike": [str(rule) for rule in dislike]}, **(described or {})}
    sources = {f"file {number}": path for number, path in enumerate(files, 1)}
    take_back = None if reader.takes_back is None else withdraw
    return build(reader, items, sources, manifest, out, split, semantic_ids, memory, report, take_back)


def described_files(files: Sequence[Path], first: int = 1) -> dict[str, dict[str, Any]]:
    """Names, sizes and checksums of source files, as manifests keep them, numbered from ``first``."""
    return {f"file {i}": {"name": path.name, **file_record(path)} for i, path in enumerate(files, first)}


def recipe_reader(
    name: str,
    files: Sequence[Path],
    report: Report,
    dislike: Sequence[Rule] = (),
    selection: Selection | None = None,
    whole: bool = True,
) -> tuple[LogReader, ItemTable | None]:
    """Reads a source's files, in any order, and its item table.

    ``dislike`` replaces the recipe's rules. Raises InputError: unknown recipe, a file that is neither events nor items
    of this source, no events. A log that is not ``whole`` may lack dislikes or likes.
    """
    if name not in RECIPES:
        raise InputError(f"--recipe {name!r}: expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    event_files, item_files = _sort_files(name, recipe, files)
    mapping = replace(recipe.mapping, dislike=tuple(dislike)) if dislike else recipe.mapping
    event_files.sort(key=lambda path: _event_word(path) in UNDO)  # of equal times, what is taken back comes first
    items = None
    if item_files and recipe.items is not None:
        items = recipe.finish_items(read_items(item_files[0], recipe.items, encoding=recipe.encoding))
    reader = LogReader(
        event_files,
        _typed_events(mapping) if recipe.event_type else read_file(mapping),
        mapping,
        report,
        selection or Selection(),
        time.time(),
        dislike if whole else (),
        whole,
        _takes_back if recipe.event_type else None,
    )
    return reader, items


def read_recipe(
    name: str,
    files: Sequence[Path],
    report: Report,
    dislike: Sequence[Rule] = (),
    selection: Selection | None = None,
    whole: bool = True,
) -> tuple[Events, ItemTable | None, np.ndarray | None]:
    """Events and item table of a source's files that fit into memory, such as a day's; items that only the log knows
    come last, without text.

    Where the source has events that take back others, the third is the feedback that each event takes back, uint8 [N],
    0 for most, for `withdraw`. Arguments and errors as for `recipe_reader`.
    """
    reader, items = recipe_reader(name, log_files(files), report, dislike, selection, whole)
    with scratch_sorter() as sorter:
        log, all_items = sort_log(reader, sorter, items)
        events, takes_back = log.events()
    return events, None if items is None else all_items, takes_back


def withdraw(log: EventLog, takes_back: np.ndarray) -> tuple[EventLog, int, int]:
    """Gives every undo its meaning; ``takes_back`` uint8 [N] is the feedback that each event of the log takes back.
    Tells how many likes and dislikes were taken back, and how many of them on their own day.

    An undo is WITHDRAWN where the pair's last like or dislike before it is of its kind, so the judgement counts until
    then and no longer; else it stays a mere exposure. What was judged of the pair on the same day before it becomes an
    exposure too: everything looks at the ends of days, where it never stood (both negfast's choice).
    """
    if not takes_back.any():
        return log, 0, 0
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
    return replace(log, feedback=feedback), int(undo.sum()), int(same_day.sum())


def _takes_back(source: Source) -> np.ndarray:
    """What each event of a block takes back, uint8 [N]."""
    types = encode(source, "event_type")
    kinds = np.zeros(source.table.num_rows, np.uint8)
    for word, kind in UNDO.items():
        kinds[matches(Rule("event_type", "==", word), types)] = kind
    return kinds


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


def _typed_events(mapping: EventMapping) -> ReadFile:
    """How files are read whose name tells the type of their events, unless a column does."""
    columns = event_columns(mapping)

    def read(path: Path, bad: BadRows) -> Iterator[tuple[Source, int]]:
        if "event_type" in file_columns(path):
            yield from read_blocks(path, columns, bad=bad)
            return
        word = _event_word(path)
        if word not in ("listen", "like", "dislike", *UNDO):
            raise InputError(f"{path}: no column 'event_type', and the name is not likes, dislikes, undislikes, ...")
        for block, done in read_blocks(path, [name for name in columns if name != "event_type"], bad=bad):
            words = pa.array([word] * block.table.num_rows, pa.string())
            yield replace(block, table=block.table.append_column("event_type", words)), done

    return read


def _event_word(path: Path) -> str:
    """undislikes.parquet and undislikes-2025-03-01.parquet hold events of type undislike."""
    return re.split("[^a-z]", path.name, maxsplit=1)[0].removesuffix("s")
