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
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from negfast.data.dataset import Dataset, file_record
from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, WITHDRAWN, EventLog
from negfast.errors import InputError
from negfast.prepare.build import SemanticIdSettings, SplitSettings, build, check_replaceable
from negfast.prepare.events import EventMapping, Events, ItemMapping, Report, Selection, event_columns, read_items
from negfast.prepare.readers import BadRows, Source, encode, file_columns, read_blocks, read_table, to_strings
from negfast.prepare.reading import LogReader, ReadFile, log_files, read_file, scratch_sorter, sort_log
from negfast.prepare.rules import Rule, matches, parse_rule

UNDO = {"undislike": DISLIKE, "unlike": LIKE}  # Yambda's event types that take another back
ROLL_CALL = ("congress", "chamber", "rollnumber")  # Voteview's columns that name a roll call

Derived = dict[str, Callable[[Source], pa.Array]]  # columns that a file may lack, each from a block of its rows


@dataclass(frozen=True)
class Recipe:
    """How one source is read."""

    about: str
    mapping: EventMapping
    items: ItemMapping | None
    is_events: Callable[[Path, Sequence[str]], bool]  # (file, its columns)
    is_items: Callable[[Path, Sequence[str]], bool]
    encoding: str = "utf-8"  # of the item file
    derived: Callable[[Sequence[Path]], Derived] | None = None  # columns that events lack, given the item files
    derived_from: tuple[str, ...] = ()  # the events' columns that those are made of
    embedding: str | None = None  # a file of this name holds the items' embeddings
    takes_back: bool = False  # some events take back others
    read_items: Callable[[Path, "Recipe"], ItemTable] = field(default=lambda path, recipe: _items(path, recipe))


def _rules(*rules: str) -> tuple[Rule, ...]:
    return tuple(map(parse_rule, rules))


def _has(*names: str) -> Callable[[Path, Sequence[str]], bool]:
    return lambda path, columns: set(names) <= set(columns)


def _named(*stems: str) -> Callable[[Path, Sequence[str]], bool]:
    return lambda path, columns: path.name.startswith(stems)


def _items(path: Path, recipe: Recipe) -> ItemTable:
    assert recipe.items is not None
    return read_items(path, recipe.items, encoding=recipe.encoding)


def _films(path: Path, recipe: Recipe) -> ItemTable:
    """The year at the end of a film's title as an attribute; "(no genres listed)" is no genre."""
    items = _items(path, recipe)
    years = [tuple(re.findall(r"\((\d{4})\)\s*$", title)) for title in items.text]
    genres = [tuple(g for g in of_item if g != "(no genres listed)") for of_item in items.attributes["genres"]]
    return replace(items, attributes={"genres": genres, "year": years})


def _event_types(block: Source) -> pa.Array:
    """The type of all events of one of Yambda's flat files, which its name tells."""
    word = _event_word(block.path)
    if word not in ("listen", "like", "dislike", *UNDO):
        raise InputError(f"{block.path}: no column 'event_type', and the name is not likes, dislikes, undislikes, ...")
    return pa.array([word] * block.table.num_rows, pa.string())


def _week_seconds(block: Source) -> pa.Array:
    """VK-LSVD has no times, but a file a week with its rows in their order: the rows of a week are spread evenly over
    it (negfast's choice), in seconds since the first week."""
    week = re.search(r"week_(\d+)", block.path.name)
    if week is None:
        raise InputError(f"{block.path}: the name tells no week, expected week_NN.parquet")
    rows = block.before + np.arange(block.table.num_rows)
    return pa.array(int(week[1]) * 7 * DAY + rows * 7 * DAY // parquet.read_metadata(block.path).num_rows)


def _roll_call(block: Source) -> pa.Array:
    """The name of each row's roll call, such as 117-House-42."""
    columns = [encode(block, name) for name in ROLL_CALL]
    parts = [to_strings(column).take(pa.array(column.codes)) for column in columns]
    return pc.binary_join_element_wise(*parts, "-")


def _roll_call_dates(item_files: Sequence[Path]) -> Derived:
    """Voteview's votes have no date; the file of roll calls has it."""
    if not item_files:
        raise InputError("--recipe voteview: found no roll calls among the files, expected HS117_rollcalls.csv")
    source = read_table(item_files[0], [*ROLL_CALL, "date"], multiline=True)
    names, dates = _roll_call(source), source.table["date"].combine_chunks()

    def date(block: Source) -> pa.Array:
        return dates.take(pc.index_in(_roll_call(block), names))

    return {"roll call": _roll_call, "date": date}


def _roll_calls(path: Path, recipe: Recipe) -> ItemTable:
    """A roll call's question and description as its text."""
    source = read_table(path, [*ROLL_CALL, "vote_question", "vote_desc", "dtl_desc"], multiline=True)
    columns = [source.table[name].to_pylist() for name in ("vote_question", "vote_desc", "dtl_desc")]
    text = [": ".join(filter(None, parts)) for parts in zip(*columns, strict=True)]
    return ItemTable(_roll_call(source).to_pylist(), text, {"question": [(q,) if q else () for q in columns[0]]})


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
        derived=lambda item_files: {"event_type": _event_types},
        takes_back=True,
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
        read_items=_films,
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
        read_items=_films,
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
        read_items=_films,
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
    "vk-lsvd": Recipe(
        "week_NN.parquet, which stand in order but without times; items_metadata.parquet and item_embeddings.npz",
        EventMapping(
            dislike=_rules("dislike==true"),
            like=_rules("like==true"),
            user="user_id",
            item="item_id",
            time="second",
            time_unit="s",
        ),
        ItemMapping(id="item_id", attributes=(("author_id", ""),)),
        _has("user_id", "item_id", "like", "dislike", "timespent"),
        _has("item_id", "author_id", "duration"),
        derived=lambda item_files: {"second": _week_seconds},
        embedding="item_embeddings.npz",
    ),
    "scholar-inbox": Recipe(
        "rated_papers.csv, -1 is a dislike; implicit_interactions.csv gives exposures",
        EventMapping(
            dislike=_rules("rating==-1"),
            like=_rules("rating==1"),
            user="user_id",
            item="arxiv_id",
            time="time",
            time_unit="iso",
        ),
        None,
        _has("arxiv_id", "user_id", "time"),
        lambda path, columns: False,
        derived=lambda item_files: {"rating": lambda block: pa.array([""] * block.table.num_rows)},
    ),
    "piki": Recipe(
        "piki_dataset.csv; liked is 0 for a dislike, 1 for a like and 2 for a superlike",
        EventMapping(
            dislike=_rules("liked==0"),
            like=_rules("liked>=1"),
            user="user_id",
            item="song_id",
            time="timestamp",
        ),
        None,
        _has("timestamp", "user_id", "song_id", "liked"),
        lambda path, columns: False,
    ),
    "voteview": Recipe(
        "HS117_votes.csv and HS117_rollcalls.csv; nay (also paired, announced) is a dislike, an abstention an exposure",
        EventMapping(
            dislike=_rules("cast_code==4", "cast_code==5", "cast_code==6"),
            like=_rules("cast_code==1", "cast_code==2", "cast_code==3"),
            user="icpsr",
            item="roll call",
            time="date",
            time_unit="iso",
        ),
        ItemMapping(),
        _has(*ROLL_CALL, "icpsr", "cast_code"),
        _has(*ROLL_CALL, "date", "vote_question", "vote_desc", "dtl_desc"),
        derived=_roll_call_dates,
        derived_from=ROLL_CALL,
        read_items=_roll_calls,
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
    embedding = next((path for path in files if path.name == recipe.embedding), None)
    event_files, item_files = _sort_files(name, recipe, [path for path in files if path != embedding])
    mapping = replace(recipe.mapping, dislike=tuple(dislike)) if dislike else recipe.mapping
    event_files.sort(key=lambda path: _event_word(path) in UNDO)  # of equal times, what is taken back comes first
    items = recipe.read_items(item_files[0], recipe) if item_files else None
    if embedding is not None:
        items = _with_embedding(items, embedding)
    derived = recipe.derived(item_files) if recipe.derived else None
    reader = LogReader(
        event_files,
        read_file(mapping) if derived is None else _read_derived(mapping, derived, recipe.derived_from),
        mapping,
        report,
        selection or Selection(),
        time.time(),
        dislike if whole else (),
        whole,
        _takes_back if recipe.takes_back else None,
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


def _with_embedding(items: ItemTable | None, path: Path) -> ItemTable:
    """The items with the embeddings of a .npz of VK-LSVD's form: item_id [N] and embedding [N, D]; 0 where it has
    none of an item."""
    if items is None:
        raise InputError(f"{path}: an item embedding needs the item table, items_metadata.parquet")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, rows = arrays["item_id"], arrays["embedding"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as item embeddings: {error}, expected item_id, embedding") from error
    if rows.ndim != 2 or ids.shape != rows.shape[:1]:
        raise InputError(f"{path}: found item_id {ids.shape} and embedding {rows.shape}, expected [N] and [N, D]")
    place = {str(item): row for row, item in enumerate(ids.tolist())}
    of_item = np.array([place.get(item, -1) for item in items.ids])
    return replace(items, embedding=np.where(of_item[:, None] < 0, 0, rows[of_item]).astype(np.float32))


def _read_derived(mapping: EventMapping, derived: Derived, derived_from: Sequence[str]) -> ReadFile:
    """How event files are read that may lack the columns of ``derived``."""
    columns = event_columns(mapping)

    def read(path: Path, bad: BadRows) -> Iterator[tuple[Source, int]]:
        present = file_columns(path)
        missing = [name for name in derived if name not in present]
        read_columns = [*(name for name in columns if name not in missing), *derived_from]
        for block, done in read_blocks(path, read_columns, bad=bad):
            for name in missing:
                block = replace(block, table=block.table.append_column(name, derived[name](block)))
            yield block, done

    return read


def _event_word(path: Path) -> str:
    """undislikes.parquet and undislikes-2025-03-01.parquet hold events of type undislike."""
    return re.split("[^a-z]", path.name, maxsplit=1)[0].removesuffix("s")
