"""From source files to a prepared data set: validate, index, split, semantic IDs, shard."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

import negfast
from negfast.data.dataset import (
    MANIFEST,
    VERIFIED,
    Dataset,
    date_of,
    day_of,
    file_record,
    is_data_folder,
    write_dataset,
)
from negfast.data.items import ItemTable
from negfast.data.log import DAY, Cuts, EventLog
from negfast.data.split import Split, all_requests, split_requests
from negfast.errors import InputError
from negfast.files import atomic_directory, check_output
from negfast.memory import total_memory
from negfast.prepare.events import (
    EventMapping,
    Events,
    ItemMapping,
    Report,
    Selection,
    check_column,
    read_column,
    read_events,
    read_items,
)

WITHIN = (0.76, 0.88)  # shares of a community's events before valid and before test, with --split-within
SHARES = np.array([0.60, 0.15, 0.25])  # of train, valid and test in the user-days with a dislike ahead
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
    """L levels of K codes, and how they are made; the words are those of ``negfast.sid.build``."""

    levels: int = 3
    codebook: int = 256
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
    report: Report = print,
) -> Dataset:
    """Makes a data set of event files with the same columns and, where given, an item file; items that only the log
    knows come after those of the file, without text. Raises InputError; nothing is left then."""
    check_replaceable(out, force)
    items = None if items_path is None else read_items(items_path, item_mapping, item_embedding)
    if items is None and item_embedding is not None:
        raise InputError(f"{item_embedding}: an item embedding needs an item table (--items)")
    of_item = None
    if split.within is not None and items_path is not None:
        of_item = read_column(items_path, item_mapping, split.within)
    if split.within is not None and of_item is None:
        check_column(event_files[0], items_path, mapping, split.within)
        mapping = replace(mapping, community=split.within)
    events, all_items = read_events(event_files, mapping, items, report, selection)
    if of_item is not None:
        events = replace(
            events, community=np.array([of_item.get(i, "") for i in all_items.ids], object)[events.log.item]
        )
    events = drop_repeats(events, selection, report)
    names = ["events", *(f"events {number}" for number in range(2, len(event_files) + 1))]
    sources = {**dict(zip(names, event_files, strict=True)), "items": items_path, "item_embedding": item_embedding}
    described: dict[str, Any] = {
        "sources": {k: {"name": p.name, **file_record(p)} for k, p in sources.items() if p is not None},
        "mapping": _described(mapping),
        "item_mapping": None if items is None else asdict(item_mapping),
    }
    return build(events, all_items, described, out, split, semantic_ids, report)


def build(
    events: Events,
    items: ItemTable,
    described: dict[str, Any],
    out: Path,
    split: SplitSettings,
    semantic_ids: SemanticIdSettings,
    report: Report,
) -> Dataset:
    """Splits, makes semantic IDs and writes the directory under a temporary name, then renames it to ``out``."""
    log = events.log
    for count, what in ((log.n_users, "user"), (log.n_items, "item")):
        if count < 2:
            raise InputError(f"the log has {count} {what}, expected at least 2")
    report_log(log, items, report)
    said: dict[str, Any] = {}
    if split.within is None:
        horizon, valid_day, test_day = choose_split(log, split, report)
    else:
        cuts, said = split_within(events, split.within, report)
        log = replace(log, cuts=cuts)
        horizon, valid_day, test_day = split.horizon, cuts.valid_day, cuts.valid_day + 1
    report_split(split_requests(log, horizon, valid_day, test_day), report)
    from negfast.sid.build import build_semantic_ids  # imports torch and faiss, which bad input need not wait for

    with atomic_directory(out) as directory:
        sids = build_semantic_ids(items, log, valid_day, **asdict(semantic_ids), report=report)
        manifest = {
            "negfast": negfast.__version__,
            **described,
            "counts": counts(log),
            "days": {"first": date_of(log.day.min()), "last": date_of(log.day.max())},
            "split": {"horizon": horizon, "valid": date_of(valid_day), "test": date_of(test_day), **said},
            "semantic_ids": {**asdict(semantic_ids), "report": sids.report},
        }
        tensors = {"codes": sids.codes, "embedding": sids.embedding, **sids.quantizer.tensors()}
        with disk_errors(out):
            write_dataset(directory, log, events.user_ids, items, tensors, manifest)
    report(f"data set: {out}")
    return Dataset.open(out)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Whatever a writer raises where the disk is full, as one OSError that names ``out``."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise OSError(f"{out}: cannot be written: {' '.join(str(error).split())}") from error


def drop_repeats(events: Events, selection: Selection | None, report: Report) -> Events:
    """The events without repeats, if ``selection`` drops them."""
    if selection is None or not selection.drop_repeats:
        return events
    repeats = events.log.repeats()
    selection.left_out["repeats"] = int(repeats.sum())
    report(f"repeats: {repeats.sum():,} events dropped that are the same as an earlier one, second and all")
    community = None if events.community is None else events.community[~repeats]
    return replace(events, log=events.log.without(repeats), community=community)


def summary(data: Dataset, selection: Selection, said: Sequence[str]) -> dict[str, Any]:
    """What `negfast prepare --json` prints: JSON types only."""
    split = data.split()
    parts = {"train": split.train, "valid": split.valid, "test": split.test}
    return {
        "data": str(data.path),
        **{key: data.manifest[key] for key in ("counts", "days", "split", "semantic_ids", "sources")},
        "user_days": {
            name: {"active": len(part), "with_dislike_ahead": int(part.has_dislikes.sum())}
            for name, part in parts.items()
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


def choose_split(log: EventLog, settings: SplitSettings, report: Report) -> tuple[int, int, int]:
    """(horizon, valid day, test day), days since 1970.

    A log of D days has D - 3 H request days, since each of the three parts needs H days of future. Dates that are not
    given are those by which the parts come nearest to SHARES of the user-days with a dislike ahead (negfast's choice):
    the smallest part, measured by its share, is as large as it can be.
    Raises InputError for dates that leave a part without a day.
    """
    horizon = settings.horizon
    first, last = int(log.day.min()), int(log.day.max())
    if horizon < 1:
        raise InputError(f"--horizon {horizon}: expected at least 1 day")
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
    if valid is None or test is None:
        valid, test = _balanced_days(log, horizon, valid, test)
    chosen = "" if settings.valid and settings.test else " (chosen from the log; --valid and --test set it)"
    report(f"split: horizon {horizon} days, valid from {date_of(valid)}, test from {date_of(test)}{chosen}")
    return horizon, valid, test


def split_within(events: Events, column: str, report: Report) -> tuple[Cuts, dict[str, Any]]:
    """Where each community's parts begin and end, and what the manifest says of it.

    InputError where an event has no community, or a user or item has two: nothing may cross.
    """
    log, community = events.log, events.community
    assert community is not None
    names, of_event = np.unique(community.astype(str), return_inverse=True)
    if (missing := np.flatnonzero(community == "")).size:
        raise InputError(f"--split-within {column!r}: item {events.item_ids[log.item[missing[0]]]!r} has none")
    for what, of, ids in (("user", log.user, events.user_ids), ("item", log.item, events.item_ids)):
        kept = np.zeros(len(ids), np.int64)
        kept[of] = of_event
        if (crossing := np.flatnonzero(kept[of] != of_event)).size:
            row = crossing[0]
            raise InputError(
                f"--split-within {column!r}: {what} {ids[of[row]]!r} has events in {names[of_event[row]]!r} and in "
                f"{names[kept[of[row]]]!r}, expected one community for each user and item"
            )
    moments = np.empty((len(names), 3), np.int64)
    for number in range(len(names)):
        time = np.sort(log.time[of_event == number])
        moments[number, :2] = time[[int(share * len(time)) for share in WITHIN]]
        moments[number, 2] = (time[-1] // DAY + 1) * DAY
    of_user = np.zeros(log.n_users, np.int64)
    of_user[log.user] = of_event
    report(
        f"split: within {len(names):,} communities ({column}), valid from {WITHIN[0]:.0%} and test from "
        f"{WITHIN[1]:.0%} of each one's events on"
    )
    return Cuts(int(log.day.max()) + 1, moments[of_user]), {"within": column, "communities": len(names)}


def _balanced_days(log: EventLog, horizon: int, valid: int | None, test: int | None) -> tuple[int, int]:
    """The first days of valid and test, either given or chosen; see `choose_split`."""
    first, last = int(log.day.min()), int(log.day.max())
    requests = all_requests(log, horizon)
    for days in (requests.day[requests.has_dislikes], np.arange(first, last + 1)):  # the calendar, if nothing else does
        cumulative = np.concatenate([[0], np.cumsum(np.bincount(days - first, minlength=last - first + 1))])

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


def counts(log: EventLog) -> dict[str, int]:
    return {"users": log.n_users, "items": log.n_items, "events": len(log), **log.feedback_counts()}


def report_log(log: EventLog, items: ItemTable, report: Report) -> None:
    report(f"events: {len(log):,} by {log.n_users:,} users on {log.n_items:,} items")
    shares = [f"{n:,} {name} ({n / len(log):.1%})" for name, n in log.feedback_counts().items()]
    report(f"feedback: {', '.join(shares)}")
    if repeats := int(log.repeats().sum()):
        report(f"repeats: {repeats:,} events are the same as an earlier one, second and all; --drop-repeats drops them")
    _warn_of_memory(log, report)
    if not any(items.text):
        report("items: no text")


def report_split(split: Split, report: Report) -> None:
    for name, requests in (("train", split.train), ("valid", split.valid), ("test", split.test)):
        with_dislikes = int(requests.has_dislikes.sum())
        report(f"{name}: {len(requests):,} active user-days, {with_dislikes:,} with a dislike ahead")
        if with_dislikes < FEW:
            report(f"warning: {name} has {with_dislikes:,} user-days with a dislike ahead, fewer than {FEW}")


def _warn_of_memory(log: EventLog, report: Report) -> None:
    from negfast.sid.prior import TABLE_BYTES  # imports torch, which bad input need not wait for

    n_days = int(log.day.max()) - int(log.day.min()) + 2
    needed, there = TABLE_BYTES * n_days * log.n_items, total_memory()
    if needed > there:
        report(
            f"warning: training keeps tables of {n_days:,} days x {log.n_items:,} items: about {needed / 2**30:.1f} "
            f"GiB, this machine has {there / 2**30:.1f}; --from cuts days"
        )
