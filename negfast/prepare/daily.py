"""`negfast prepare --like`: new events join a data set that is there, and no item's semantic ID changes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import negfast
from negfast.data.dataset import Dataset, date_of, write_dataset
from negfast.data.items import ItemTable
from negfast.data.log import EventLog
from negfast.errors import InputError
from negfast.files import atomic_directory
from negfast.prepare.build import (
    Report,
    SplitSettings,
    check_replaceable,
    choose_split,
    disk_errors,
    report_log,
    report_split,
)
from negfast.prepare.events import EventMapping, Events, ItemMapping, Selection, read_items
from negfast.prepare.reading import log_files, read_events
from negfast.prepare.recipes import described_files, read_recipe, withdraw
from negfast.prepare.rules import parse_rule
from negfast.prepare.writing import LogSummary, taken_back


@dataclass(frozen=True)
class NewDay:
    """What the new files hold, indexed for themselves."""

    events: Events
    items: ItemTable | None
    takes_back: np.ndarray | None  # uint8 [N], see `negfast.prepare.recipes.withdraw`


def prepare_like(
    files: Sequence[Path],
    like: Path,
    out: Path,
    *,
    items_path: Path | None = None,
    split: tuple[str | None, str | None] = (None, None),
    selection: Selection | None = None,
    force: bool = False,
    report: Report = print,
) -> Dataset:
    """Writes the data set ``like`` (or that of a run) with the events of ``files`` added to ``out``.

    Files are read as those of ``like`` were; ``items_path`` describes new items. Old users and items keep their index
    and their semantic IDs, new ones come after them, new items with IDs of the frozen codebooks. ``split`` are the
    first days of valid and test; by default they move on by as many days as the log's end does. Events that the data
    set holds already are skipped and counted. Raises InputError, also where it holds all of them.
    """
    check_replaceable(out, force)
    files = log_files(files)
    old = Dataset.open(data_folder(like))
    old.refuse_communities()
    day = _read_day(old, files, items_path, report, selection)
    items, new_items = _all_items(old.items, day, report)
    log, user_ids, held = _joined_log(old, day, items, report)
    if selection is not None:
        selection.left_out["held_already"] = held
    if selection is not None and selection.drop_repeats:
        repeats = log.repeats()
        selection.left_out["repeats"] = int(repeats.sum())
        report(f"repeats: {repeats.sum():,} events dropped that are the same as an earlier one, second and all")
        log = log.without(repeats)
    dates = _moved_split(old, log, split)
    facts = LogSummary.of(log, dates.horizon)
    report_log(facts, items, report)
    valid_day, test_day = choose_split(facts.days, dates, report)
    report_split(facts.days.parts(valid_day, test_day), report)
    from negfast.sid.assign import assign_new  # both take a second to import, which bad input need not wait for
    from negfast.sid.embed import embed_new
    from negfast.sid.quantize import Quantizer

    settings = old.manifest["semantic_ids"]
    original = old.manifest.get("original_items", len(old.items))
    codes, embedding = old.codes, old.embedding
    if len(new_items):
        first = old.items.take(range(original))
        vectors, cold = embed_new(first, new_items, settings["report"]["blocks"], settings["seed"])
        codes = np.concatenate([codes, assign_new(vectors, cold, Quantizer.from_tensors(old.semantic_ids), codes)])
        embedding = np.concatenate([embedding, vectors])
        report(f"semantic IDs: {len(new_items):,} new items by frozen codebooks, {int(cold.sum()):,} of them cold")
        if old.items.embedding is not None:
            report(f"items: --like reads no embedding, so those {len(new_items):,} have zeros for theirs")
    kept = ("mapping", "item_mapping", "recipe", "sample")
    given = [*files, *([] if items_path is None else [items_path])]
    without = 0 if old.items.embedding is None else len(items) - original
    manifest: dict[str, Any] = {
        "negfast": negfast.__version__,
        **{key: old.manifest[key] for key in kept if key in old.manifest},
        "sources": {**described_files(given, first=1 + len(old.manifest["sources"])), **old.manifest["sources"]},
        "counts": facts.counts(),
        "days": {"first": date_of(log.day.min()), "last": date_of(log.day.max())},
        "split": {"horizon": dates.horizon, "valid": date_of(valid_day), "test": date_of(test_day)},
        "semantic_ids": settings,
        "extends": [*old.extends, old.fingerprint],
        "original_items": original,
        **({"items_without_embedding": without} if without else {}),
    }
    tensors = {"codes": codes, "embedding": embedding, **Quantizer.from_tensors(old.semantic_ids).tensors()}
    with atomic_directory(out) as directory, disk_errors(out):
        write_dataset(directory, log, user_ids, items, tensors, manifest)
    report(f"data set: {out}")
    return Dataset.open(out)


def data_folder(path: Path) -> Path:
    """The data set at ``path``, or the one that the run at ``path`` was trained on."""
    description = path / "run.json"
    if not description.is_file():
        return path
    try:
        return path / json.loads(description.read_text())["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{description}: damaged: {error}") from error


def _read_day(
    old: Dataset, files: Sequence[Path], items_path: Path | None, report: Report, selection: Selection | None
) -> NewDay:
    if "recipe" in old.manifest:
        recipe = old.manifest["recipe"]
        given = [*files, *([items_path] if items_path else [])]
        rules = [parse_rule(rule) for rule in recipe["dislike"]]
        return NewDay(*read_recipe(recipe["name"], given, report, rules, selection, whole=False))
    mapping = mapping_of(old.manifest["mapping"])
    events, _ = read_events(files, mapping, report, selection, whole=False)
    items = None
    if items_path is not None:
        if old.manifest["item_mapping"] is None:
            raise InputError(f"{items_path}: {old.path} was prepared without an item table, expected no --items")
        items = read_items(items_path, item_mapping_of(old.manifest["item_mapping"]))
    return NewDay(events, items, None)


def mapping_of(described: dict[str, Any]) -> EventMapping:
    """The mapping that a manifest describes."""
    rules = {name: tuple(map(parse_rule, described[name])) for name in ("dislike", "like")}
    columns = described["columns"]
    return EventMapping(**{**described, **rules, "columns": None if columns is None else tuple(columns)})


def item_mapping_of(described: dict[str, Any]) -> ItemMapping:
    columns, attributes = described["columns"], tuple((name, sep) for name, sep in described["attributes"])
    return ItemMapping(
        **{**described, "attributes": attributes, "columns": None if columns is None else tuple(columns)}
    )


def _all_items(old: ItemTable, day: NewDay, report: Report) -> tuple[ItemTable, ItemTable]:
    """The old items followed by the new ones, and the new ones alone."""
    known = set(old.ids)
    of_table = day.items or ItemTable([], [], {name: [] for name in old.attributes})
    fresh = of_table.take([row for row, item in enumerate(of_table.ids) if item not in known])
    known.update(fresh.ids)
    bare = [item for item in day.events.item_ids if item not in known]
    if bare:
        report(f"items: {len(bare):,} new ones without a row in an item table (--items), so without text")
    attributes = {name: fresh.attributes.get(name, [()] * len(fresh)) for name in old.attributes}
    embedding = None if old.embedding is None else np.zeros((len(fresh), old.embedding.shape[1]), np.float32)
    added = ItemTable(fresh.ids, fresh.text, attributes, embedding).extended(bare)
    both = ItemTable(
        [*old.ids, *added.ids],
        [*old.text, *added.text],
        {name: [*values, *added.attributes[name]] for name, values in old.attributes.items()},
        None if added.embedding is None else np.concatenate([old.embedding, added.embedding]),
    )
    return both, added


def _joined_log(old: Dataset, day: NewDay, items: ItemTable, report: Report) -> tuple[EventLog, list[str], int]:
    """All events, sorted by (user, time), of equal times the old ones first; the user ids; and how many of the new
    events the data set held already, which are not added again."""
    new, log = day.events, old.log
    user_ids = [*old.user_ids, *sorted(set(new.user_ids) - set(old.user_ids), key=lambda name: (len(name), name))]
    user_of = {name: index for index, name in enumerate(user_ids)}
    item_of = {name: index for index, name in enumerate(items.ids)}
    new_user = np.array([user_of[name] for name in new.user_ids], np.int32)[new.log.user]
    new_item = np.array([item_of[name] for name in new.item_ids], np.int32)[new.log.item]
    user, item = np.concatenate([log.user, new_user]), np.concatenate([log.item, new_item])
    time, feedback = np.concatenate([log.time, new.log.time]), np.concatenate([log.feedback, new.log.feedback])
    value = None
    if log.value is not None or new.log.value is not None:
        of = [np.full(len(part), np.nan, np.float32) if part.value is None else part.value for part in (log, new.log)]
        value = np.concatenate(of)
    held = _held_already(len(log), user, item, time, len(items))
    if held[len(log) :].all():
        raise InputError(f"{old.path}: holds all {len(new.log):,} events already, expected new ones")
    if (first := int(new.log.day.min())) < int(log.day.min()):
        report(f"warning: new events begin on {date_of(first)}, before all of {old.path}; --from cuts them")
    if held.any():
        report(f"events: {held.sum():,} are in {old.path} already, and are skipped")
    kept = np.flatnonzero(~held)
    order = kept[np.lexsort((time[kept], user[kept]))]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user[kept], minlength=len(user_ids)))]).astype(np.int64)
    joined = EventLog(
        offsets, item[order], feedback[order], time[order], None if value is None else value[order], len(items)
    )
    if day.takes_back is not None:
        undo = np.concatenate([np.zeros(len(log), np.uint8), day.takes_back])[order]
        joined, *counts = withdraw(joined, undo)
        report(taken_back(*counts))
    return joined, user_ids, int(held.sum())


def _held_already(n_old: int, user: np.ndarray, item: np.ndarray, time: np.ndarray, n_items: int) -> np.ndarray:
    """Which of all events are new ones with user, item and time of an old one, bool [N]: a job that runs twice must not
    count twice."""
    since = time[n_old:].min()
    rows = np.flatnonzero(time >= since)  # the old events that can be meant are few
    pair = user[rows].astype(np.int64) * n_items + item[rows]
    pair = np.unique(pair, return_inverse=True)[1]
    key = pair * (int(time[rows].max() - since) + 1) + (time[rows] - since)
    held = np.zeros(len(time), bool)
    held[rows] = (rows >= n_old) & np.isin(key, key[rows < n_old])
    return held


def _moved_split(old: Dataset, log: EventLog, split: tuple[str | None, str | None]) -> SplitSettings:
    moved = int(log.day.max()) - int(old.log.day.max())
    valid, test = split
    return SplitSettings(old.horizon, valid or date_of(old.valid_day + moved), test or date_of(old.test_day + moved))
