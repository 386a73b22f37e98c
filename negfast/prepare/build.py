"""From source files to a prepared data set: validate, index, split, semantic IDs, shard."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

import negfast
from negfast.data.dataset import (
    EVENTS,
    MANIFEST,
    VERIFIED,
    Dataset,
    date_of,
    day_of,
    file_record,
    finish_dataset,
    is_data_folder,
)
from negfast.data.items import ItemTable
from negfast.data.log import Cuts, EventLog
from negfast.data.shards import Shard
from negfast.data.split import DayCounts
from negfast.errors import InputError
from negfast.files import atomic_directory, check_output
from negfast.memory import available_memory, total_memory
from negfast.prepare.communities import WITHIN, Communities
from negfast.prepare.events import (
    EventMapping,
    ItemMapping,
    Report,
    Selection,
    check_column,
    read_column,
    read_items,
)
from negfast.prepare.reading import LogReader, log_files, read_file, scratch_sorter, sort_log
from negfast.prepare.writing import LogSummary, TakeBack, count_parts, taken_back, write_log

SHARES = np.array([0.60, 0.15, 0.25])  # of train, valid and test in the user-days with a dislike ahead
RESERVED, LEAST_ENGINE = 768 << 20, 512 << 20  # bytes of the process beside the sort, and of the least sort
USER_BYTES, ITEM_BYTES = 100, 500  # of a user's id, of a row of the item table
LEARNING = 1_600_000_000  # bytes while the axes of co-occurrence or TF-IDF are learned from samples
ASSIGNING, VALUE_BYTES = 800_000_000, 16  # bytes while items get their codes: in all, of a value of an item's vector
WIDTHS = {"minilm": 384, "auto": 384, "tfidf": 128}  # of a text's vector at most, by encoder
COOCCURRENCE = 128  # width
SAMPLED_EVENTS, SAMPLED_USERS = 10_000_000, 1 << 17  # that co-occurrence is learned from, at most
FEW = 100  # user-days with a dislike ahead: a part with fewer says little


@dataclass(frozen=True)
class SplitSettings:
    """Horizon in days; first day of valid and test as ISO dates, chosen from the log where None.

    ``within`` names a column of the items or events: in each of its communities the first 76 % of the events in time
    are train, those up to 88 % valid and the rest test.
    """

    horizon: int = 7
    valid: str | None = None
    test: str | None = None
    within: str | None = None


@dataclass(frozen=True)
class SemanticIdSettings:
    """L levels of K codes, chosen from the number of items where None, and how they are made; the words are those of
    ``negfast.sid.build``."""

    levels: int | None = None
    codebook: int | None = None
    quantizer: str = "rq-kmeans"
    encoder: str = "auto"
    seed: int = 0


def prepare(
    event_files: Sequence[Path],
    items_path: Path | None,
    out: Path,
    *,
    mapping: EventMapping,
    item_mapping: ItemMapping,
    item_embedding: Path | None = None,
    split: SplitSettings,
    semantic_ids: SemanticIdSettings,
    selection: Selection | None = None,
    force: bool = False,
    memory: int | None = None,
    report: Report = print,
) -> Dataset:
    """Makes a data set of event files with the same columns and, where given, an item file; items that only the log
    knows come after those of the file, without text. ``event_files`` may be directories of such files; in which order
    they are given makes no difference. ``memory``: bytes that the process may take (None: half of what is free).
    Raises InputError; nothing is left then."""
    check_replaceable(out, force)
    selection = selection or Selection()
    items = None if items_path is None else read_items(items_path, item_mapping, item_embedding)
    if items is None and item_embedding is not None:
        raise InputError(f"{item_embedding}: an item embedding needs an item table (--items)")
    rules, files = (*mapping.dislike, *mapping.like), log_files(event_files)
    community_of = None
    if split.within is not None:
        community_of = None if items_path is None else read_column(items_path, item_mapping, split.within)
        if community_of is None:
            check_column(files[0], items_path, mapping, split.within)
            mapping = replace(mapping, community=split.within)
    reader = LogReader(files, read_file(mapping), mapping, report, selection, time.time(), rules)
    names = ["events", *(f"events {number}" for number in range(2, len(files) + 1))]
    sources = {**dict(zip(names, files, strict=True)), "items": items_path, "item_embedding": item_embedding}
    described: dict[str, Any] = {
        "mapping": _described(mapping),
        "item_mapping": None if items is None else asdict(item_mapping),
    }
    given = {name: path for name, path in sources.items() if path is not None}
    return build(reader, items, given, described, out, split, semantic_ids, memory, report, community_of=community_of)


def build(
    reader: LogReader,
    items: ItemTable | None,
    sources: dict[str, Path],
    described: dict[str, Any],
    out: Path,
    split: SplitSettings,
    semantic_ids: SemanticIdSettings,
    memory: int | None,
    report: Report,
    take_back: TakeBack | None = None,
    community_of: Mapping[str, str] | None = None,
) -> Dataset:
    """Reads and sorts the log, splits it, makes semantic IDs and writes the directory under a temporary name, then
    renames it to ``out``. Raises InputError; ``memory`` and ``take_back`` as for `prepare` and `write_log`.
    ``community_of`` gives the community of each item for ``split.within`` (None: the events tell theirs)."""
    engine = engine_memory(memory, items, semantic_ids.encoder)
    with atomic_directory(out) as directory:
        with disk_errors(out), scratch_sorter(directory, engine) as sorter:
            log, items = sort_log(reader, sorter, items)
            for ids, what in ((log.user_ids, "user"), (log.item_ids, "item")):
                if len(ids) < 2:
                    raise InputError(f"the log has {len(ids)} {what}, expected at least 2")
            if memory is not None:
                engine_memory(memory, items, semantic_ids.encoder, len(log.user_ids))
            check_split(log.first_day, log.last_day, split)
            drops = reader.selection.drop_repeats
            communities = cuts = None
            if split.within is not None and community_of is not None:
                communities = Communities.of_items(split.within, log, community_of)
            elif split.within is not None:
                communities = Communities.of_events(split.within, log, list(reader.communities))
            facts = write_log(
                directory, log, split.horizon, drop_repeats=drops, take_back=take_back, communities=communities
            )
            shard, user_ids = Shard([str(directory / EVENTS)]), log.user_ids
            if communities is not None:
                n_communities = communities.find_moments(shard)
        if take_back is not None:
            report(taken_back(facts.taken_back, facts.taken_back_same_day))
        if drops:
            reader.selection.left_out["repeats"] = facts.repeats
            report(f"repeats: {facts.repeats:,} events dropped that are the same as an earlier one, second and all")
        report_log(facts, items, report, drops)
        said: dict[str, Any] = {}
        if communities is None:
            valid_day, test_day = choose_split(facts.days, split, report)
            parts = facts.days.parts(valid_day, test_day)
        else:
            valid_day, test_day = facts.days.last + 1, facts.days.last + 2
            cuts = communities.cuts(valid_day)
            said = {"within": split.within, "communities": n_communities}
            report(
                f"split: within {n_communities:,} communities ({split.within}), valid from {WITHIN[0]:.0%} and test "
                f"from {WITHIN[1]:.0%} of each one's events on"
            )
            days = facts.days.first, facts.days.last
            parts = count_parts(shard, split.horizon, valid_day, test_day, days, cuts)
        report_split(parts, report)
        from negfast.sid.build import (
            build_semantic_ids,
            choose_shape,
        )  # imports faiss and scikit-learn: bad input need not wait

        levels, codebook = choose_shape(len(items), semantic_ids.levels, semantic_ids.codebook, report)
        semantic_ids = replace(semantic_ids, levels=levels, codebook=codebook)
        sample = sample_log(shard, semantic_ids.seed, report, cuts)
        sids = build_semantic_ids(items, sample, valid_day, **asdict(semantic_ids), report=report)
        manifest = {
            "negfast": negfast.__version__,
            "sources": {name: {"name": path.name, **file_record(path)} for name, path in sources.items()},
            **described,
            "counts": facts.counts(),
            "days": {"first": date_of(facts.days.first), "last": date_of(facts.days.last)},
            "split": {"horizon": split.horizon, "valid": date_of(valid_day), "test": date_of(test_day), **said},
            "semantic_ids": {**asdict(semantic_ids), "report": sids.report},
        }
        tensors = {"codes": sids.codes, "embedding": sids.embedding, **sids.quantizer.tensors()}
        with disk_errors(out):
            finish_dataset(directory, user_ids, items, tensors, manifest, cuts)
    report(f"data set: {out}")
    return Dataset.open(out)


def engine_memory(memory: int | None, items: ItemTable | None, encoder: str, n_users: int = 0) -> int:
    """Bytes that sorting may take of the ``memory`` given, or of half of what is free. Raises InputError where that is
    too little for so many items and users, or more than there is."""
    if memory is None:
        return max(available_memory() // 2 - RESERVED, LEAST_ENGINE)
    n_items, width = (0, 0) if items is None else (len(items), _vector_width(items, encoder))
    tables = USER_BYTES * n_users + ITEM_BYTES * n_items
    needed = tables + max(RESERVED + LEAST_ENGINE, LEARNING, ASSIGNING + VALUE_BYTES * width * n_items)
    what = f"{n_items:,} items and {n_users:,} users need" if n_items else "preparing any log needs"
    if memory < needed:
        raise InputError(f"--memory {memory / 1e9:.2f}GB: {what} at least {math.ceil(needed / 1e7) / 100:.2f}GB")
    if memory > (there := total_memory()):
        raise InputError(f"--memory {memory / 1e9:.2f}GB: this machine has {there / 1e9:.2f}GB")
    return memory - RESERVED - tables


def _vector_width(items: ItemTable, encoder: str) -> int:
    """Values of an item's vector, at most."""
    own = 0 if items.embedding is None else items.embedding.shape[1]
    text = WIDTHS.get(encoder, 384) if any(items.text) or items.attributes else 0
    return own + text + (COOCCURRENCE if not all(items.text) else 0)


def sample_log(shard: Shard, seed: int, report: Report, cuts: Cuts | None = None) -> EventLog:
    """The histories that co-occurrence is learned from: all, or those of SAMPLED_USERS users and at most SAMPLED_EVENTS
    events, drawn by ``seed``."""
    if shard.n_events <= SAMPLED_EVENTS and shard.n_users <= SAMPLED_USERS:
        return EventLog(*shard.get_many(), None, shard.n_items, cuts)
    drawn = np.random.default_rng(seed).permutation(shard.n_users)[:SAMPLED_USERS].astype(np.int32)
    users = np.sort(drawn[: np.searchsorted(shard.offsets(drawn), SAMPLED_EVENTS, side="right") - 1])
    report(f"semantic IDs: co-occurrence from {len(users):,} users of {shard.n_users:,}, drawn by the seed")
    return EventLog(*shard.get_many(users), None, shard.n_items, None if cuts is None else cuts.take(users))


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Whatever a writer raises where the disk is full, as one OSError that names ``out``."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise OSError(f"{out}: cannot be written: {' '.join(str(error).split())}") from error


def summary(data: Dataset, selection: Selection, said: Sequence[str]) -> dict[str, Any]:
    """What `negfast prepare --json` prints: JSON types only."""
    first, last = (day_of(data.manifest["days"][end]) for end in ("first", "last"))
    parts = count_parts(data.shard, data.horizon, data.valid_day, data.test_day, (first, last), data.cuts)
    return {
        "data": str(data.path),
        **{key: data.manifest[key] for key in ("counts", "days", "split", "semantic_ids", "sources")},
        "user_days": {
            name: {"active": active, "with_dislike_ahead": with_dislikes}
            for name, (active, with_dislikes) in parts.items()
        },
        "left_out": selection.left_out,
        "warnings": [line.removeprefix("warning: ") for line in said if line.startswith("warning: ")],
    }


def check_replaceable(out: Path, force: bool) -> None:
    """Raises InputError if ``out`` is there and may not be replaced: only a data set may, and only by force. Neither is
    a data set written into a run or another data set."""
    check_output(out)
    for folder in out.absolute().parents:
        if (folder / "run.json").is_file() or is_data_folder(folder):
            raise InputError(f"{out}: lies inside {folder}, a run or a data set; choose another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        manifest = json.loads((out / MANIFEST).read_text("utf-8"))
        own = {MANIFEST, VERIFIED, *manifest["files"]} if "format" in manifest else None
    except (OSError, ValueError, TypeError, KeyError):
        own = None
    if own is None:
        raise InputError(f"{out}: exists and is no data set; choose another --out")
    if not force:
        raise InputError(f"{out}: a data set is there already; --force replaces it")
    for path in out.iterdir():  # also what an append left that was killed: events.nfs.000001
        if not any(path.name == name or path.name.startswith(f"{name}.") for name in own):
            raise InputError(f"{path}: is no part of the data set, and --force would remove it; move it elsewhere")


def check_split(first: int, last: int, settings: SplitSettings) -> tuple[int | None, int | None]:
    """The first days of valid and test that are given. Raises InputError where a log from day ``first`` to ``last``
    leaves a part without a day: one of D days has D - 3 H request days, as each part needs H days of future."""
    horizon = settings.horizon
    if horizon < 1:
        raise InputError(f"--horizon {horizon}: expected at least 1 day")
    if settings.within is not None:
        return None, None
    if last - first + 1 - 3 * horizon < 3:
        raise InputError(
            f"the log covers {last - first + 1} days ({date_of(first)} to {date_of(last)}), "
            f"a horizon of {horizon} days needs at least {3 * horizon + 3}: "
            "give a smaller --horizon, or the right --time-unit"
        )
    valid, test = check_date("--valid", settings.valid), check_date("--test", settings.test)
    earliest = first + horizon + 1
    for name, day, low, high in (
        ("--valid", valid, earliest, last - 2 * horizon - 1),
        ("--test", test, (earliest if valid is None else valid) + horizon + 1, last - horizon),
    ):
        if day is not None and not low <= day <= high:
            raise InputError(
                f"{name} {date_of(day)}: expected {date_of(low)} to {date_of(high)} for a log of {date_of(first)} to "
                f"{date_of(last)} and a horizon of {horizon} days"
            )
    return valid, test


def choose_split(days: DayCounts, settings: SplitSettings, report: Report) -> tuple[int, int]:
    """First days of valid and test, days since 1970.

    Dates that are not given are those by which the parts come nearest to SHARES of the user-days with a dislike ahead
    (negfast's choice): the smallest part, measured by its share, is as large as it can be. Raises InputError as
    `check_split` does.
    """
    valid, test = check_split(days.first, days.last, settings)
    if valid is None or test is None:
        valid, test = _balanced_days(days, valid, test)
    chosen = "" if settings.valid and settings.test else " (chosen from the log; --valid and --test set it)"
    report(f"split: horizon {days.horizon} days, valid from {date_of(valid)}, test from {date_of(test)}{chosen}")
    return valid, test


def _balanced_days(days: DayCounts, valid: int | None, test: int | None) -> tuple[int, int]:
    """The first days of valid and test, either given or chosen; see `choose_split`."""
    first, last, horizon = days.first, days.last, days.horizon
    for counts in (days.with_dislikes, np.ones_like(days.active)):  # the calendar, if nothing else does
        cumulative = np.concatenate([[0], np.cumsum(counts)])

        def before(day: np.ndarray, cumulative: np.ndarray = cumulative) -> np.ndarray:
            return cumulative[day - first]

        tests = np.arange(first + 2 * horizon + 2, last - horizon + 1) if test is None else np.array([test])
        if valid is not None:
            tests = tests[tests > valid + horizon]
            valids = np.full(len(tests), valid)
        elif test is not None:
            valids = np.arange(first + horizon + 1, test - horizon)
            tests = np.full(len(valids), test)
        else:  # train grows with the day of valid and valid shrinks: their shares are level at one day for each test
            every = np.arange(first + horizon + 1, last - 2 * horizon)
            level = before(every - horizon) / SHARES[0] + before(every) / SHARES[1]
            place = np.searchsorted(level, before(tests - horizon) / SHARES[1])
            tests = np.tile(tests, 2)
            valids = every[np.clip(np.concatenate([place, place - 1]), 0, len(every) - 1)]
            valids = np.minimum(valids, tests - horizon - 1)
        sizes = (
            before(valids - horizon),
            before(tests - horizon) - before(valids),
            before(np.array(last - horizon + 1)) - before(tests),
        )
        smallest = (np.stack(sizes, axis=1) / SHARES).min(axis=1)
        best = int(np.argmax(smallest))
        if smallest[best] > 0:
            break
    return int(valids[best]), int(tests[best])


def check_date(option: str, text: str | None) -> int | None:
    """Days since 1970 of an option's date. Raises InputError."""
    try:
        return None if text is None else day_of(text)
    except ValueError:
        raise InputError(f"{option} {text!r}: expected a date like 2013-06-17") from None


def _described(mapping: EventMapping) -> dict[str, Any]:
    rules = {"dislike": [str(r) for r in mapping.dislike], "like": [str(r) for r in mapping.like]}
    return {**asdict(mapping), **rules}


def report_log(facts: LogSummary, items: ItemTable, report: Report, dropped: bool = False) -> None:
    report(f"events: {facts.n_events:,} by {facts.n_users:,} users on {facts.n_items:,} items")
    shares = [f"{n:,} {name} ({n / facts.n_events:.1%})" for name, n in facts.feedback_counts().items()]
    report(f"feedback: {', '.join(shares)}")
    if facts.repeats and not dropped:
        report(
            f"repeats: {facts.repeats:,} events are the same as an earlier one, second and all; --drop-repeats drops "
            "them"
        )
    if not any(items.text):
        report("items: no text")


def report_split(parts: dict[str, tuple[int, int]], report: Report) -> None:
    for name, (requests, with_dislikes) in parts.items():
        report(f"{name}: {requests:,} active user-days, {with_dislikes:,} with a dislike ahead")
        if with_dislikes < FEW:
            report(f"warning: {name} has {with_dislikes:,} user-days with a dislike ahead, fewer than {FEW}")
