"""What `negfast inspect` says of a data set or a shard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from negfast.data.dataset import Dataset
from negfast.data.shards import describe_shard
from negfast.errors import InputError

Report = Callable[[str], None]


def inspect_path(path: Path, report: Report) -> None:
    """Describes a data set directory or a shard file and verifies checksums. Raises InputError if damaged."""
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if path.is_dir():
        inspect_dataset(Dataset.open(path), report)
    else:
        _rows(describe_shard(path), report)


def inspect_dataset(dataset: Dataset, report: Report) -> None:
    """Counts, days, split, semantic IDs, files; then reads every byte against the manifest's checksums."""
    manifest = dataset.manifest
    counts, split, sids = manifest["counts"], manifest["split"], manifest["semantic_ids"]
    report(f"data set      {dataset.path} (format {manifest['format']}, negfast {manifest['negfast']})")
    for name, source in manifest["sources"].items():
        report(f"{name:<13} {source['name']}, {source['bytes']:,} bytes, sha256 {source['sha256'][:16]}...")
    report(f"counts        {counts['events']:,} events, {counts['users']:,} users, {counts['items']:,} items")
    shares = (f"{counts[k]:,} {k} ({counts[k] / counts['events']:.1%})" for k in ("dislikes", "likes", "exposed"))
    report(f"feedback      {', '.join(shares)}")
    report(f"days          {manifest['days']['first']} to {manifest['days']['last']}")
    report(f"split         horizon {split['horizon']} days, valid from {split['valid']}, test from {split['test']}")
    report(f"semantic IDs  {sids['levels']} levels of {sids['codebook']} codes, {sids['method']}")
    _rows(sids["report"], report, indent="  ")
    dataset.verify()
    for name, record in manifest["files"].items():
        report(f"{name:<28} {record['bytes']:>14,} bytes  ok")


def _rows(facts: dict[str, Any], report: Report, indent: str = "") -> None:
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        report(f"{indent}{key:<{width}}  {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    return str(value)
