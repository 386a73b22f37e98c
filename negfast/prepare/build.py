"""From source files to a prepared data set: validate, index, split, semantic IDs, shard."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import negfast
from negfast.data.dataset import MANIFEST, VERIFIED, Dataset, date_of, day_of, file_record, write_dataset
from negfast.data.items import ItemTable
from negfast.data.log import EventLog
from negfast.data.split import Split, split_requests
from negfast.errors import InputError
from negfast.files import atomic_directory, check_output
from negfast.prepare.events import EventMapping, Events, ItemMapping, items_of_log, read_events, read_items

Report = Callable[[str], None]
VALID_SHARE, TEST_SHARE = 0.15, 0.25  # of the request days, where no dates are given


@dataclass(frozen=True)
class SplitSettings:
    """Horizon in days; first day of valid and test as ISO dates, chosen from the log where None."""

    horizon: int = 7
    valid: str | None = None
    test: str | None = None


@dataclass(frozen=True)
class SemanticIdSettings:
    """L levels of K codes, and how they are made; the words are those of ``negfast.sid.build``."""

    levels: int = 3
    codebook: int = 256
    quantizer: str = "rq-kmeans"
    encoder: str = "auto"
    seed: int = 0


def prepare(
    events_path: Path,
    items_path: Path | None,
    out: Path,
    *,
    mapping: EventMapping,
    item_mapping: ItemMapping,
    item_embedding: Path | None = None,
    split: SplitSettings,
    semantic_ids: SemanticIdSettings,
    force: bool = False,
    report: Report = print,
) -> Dataset:
    """Makes a data set of an event file and, where given, an item file. Raises InputError; nothing is left then."""
    check_replaceable(out, force)
    items = None if items_path is None else read_items(items_path, item_mapping, item_embedding)
    if items is None and item_embedding is not None:
        raise InputError(f"{item_embedding}: an item embedding needs an item table (--items)")
    events = read_events(events_path, mapping, None if items is None else items.ids, report)
    sources = {"events": events_path, "items": items_path, "item_embedding": item_embedding}
    described: dict[str, Any] = {
        "sources": {k: {"name": p.name, **file_record(p)} for k, p in sources.items() if p is not None},
        "mapping": _described(mapping),
        "item_mapping": None if items is None else asdict(item_mapping),
    }
    return build(events, items or items_of_log(events), described, out, split, semantic_ids, report)


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
    report_log(log, items, report)
    horizon, valid_day, test_day = choose_split(log, split, report)
    report_split(split_requests(log, horizon, valid_day, test_day), report)
    from negfast.sid.build import build_semantic_ids  # imports torch and faiss, which bad input need not wait for

    with atomic_directory(out) as directory:
        sids = build_semantic_ids(items, log, valid_day, **asdict(semantic_ids), report=report)
        manifest = {
            "negfast": negfast.__version__,
            **described,
            "counts": counts(log),
            "days": {"first": date_of(log.day.min()), "last": date_of(log.day.max())},
            "split": {"horizon": horizon, "valid": date_of(valid_day), "test": date_of(test_day)},
            "semantic_ids": {**asdict(semantic_ids), "report": sids.report},
        }
        tensors = {"codes": sids.codes, "embedding": sids.embedding, **sids.quantizer.tensors()}
        write_dataset(directory, log, events.user_ids, items, tensors, manifest)
    report(f"data set: {out}")
    return Dataset.open(out)


def check_replaceable(out: Path, force: bool) -> None:
    """Raises InputError if ``out`` is there and may not be replaced: only a data set may, and only by force."""
    check_output(out)
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

    A log of D days has D - 3 H request days, since each of the three parts needs H days of future. Where a date
    is not given, 15 % of them are valid's and 25 % test's, at least one each (negfast's choice).
    Raises InputError for dates that leave a part without a day.
    """
    horizon = settings.horizon
    first, last = int(log.day.min()), int(log.day.max())
    if horizon < 1:
        raise InputError(f"--horizon {horizon}: expected at least 1 day")
    request_days = last - first + 1 - 3 * horizon
    if request_days < 3:
        raise InputError(
            f"the log covers {last - first + 1} days ({date_of(first)} to {date_of(last)}), "
            f"a horizon of {horizon} days needs at least {3 * horizon + 3}: give a smaller --horizon"
        )
    test_day = last - horizon + 1 - max(1, round(TEST_SHARE * request_days))
    valid_day = test_day - horizon - max(1, round(VALID_SHARE * request_days))
    valid_day = valid_day if settings.valid is None else _day("--valid", settings.valid)
    test_day = test_day if settings.test is None else _day("--test", settings.test)
    for name, day, low, high in (
        ("--valid", valid_day, first + horizon + 1, last - 2 * horizon - 1),
        ("--test", test_day, valid_day + horizon + 1, last - horizon),
    ):
        if not low <= day <= high:
            raise InputError(
                f"{name} {date_of(day)}: expected {date_of(low)} to {date_of(high)} for a log of {date_of(first)} to "
                f"{date_of(last)} and a horizon of {horizon} days"
            )
    chosen = "" if settings.valid and settings.test else " (chosen from the log; --valid and --test set it)"
    report(f"split: horizon {horizon} days, valid from {date_of(valid_day)}, test from {date_of(test_day)}{chosen}")
    return horizon, valid_day, test_day


def _day(option: str, text: str) -> int:
    try:
        return day_of(text)
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
    if repeats := log.count_repeats():
        report(f"repeats: {repeats:,} events are the same as the one before them, second and all; they stay and count")
    if not any(items.text):
        report("items: no text")


def report_split(split: Split, report: Report) -> None:
    for name, requests in (("train", split.train), ("valid", split.valid), ("test", split.test)):
        with_dislikes = int(requests.has_dislikes.sum())
        report(f"{name}: {len(requests):,} active user-days, {with_dislikes:,} with a dislike ahead")
