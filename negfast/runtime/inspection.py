"""What `negfast inspect` says of a data set, a shard, a table of tensors, a run or a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from negfast.data.dataset import Dataset
from negfast.data.shards import describe_shard
from negfast.errors import InputError
from negfast.runtime.checkpoint import STATE, check_checkpoint, read_state
from negfast.runtime.run_folder import RunFolder

Report = Callable[[str], None]


def inspect_path(path: Path, report: Report) -> None:
    """Describes what lies at ``path`` and verifies checksums where there are any. Raises InputError if damaged."""
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if (path / "run.json").is_file():
        inspect_run(path, report)
    elif (path / "policy.safetensors").is_file():
        inspect_checkpoint(path, report)
    elif path.is_dir():
        inspect_dataset(Dataset.open(path), report)
    elif path.suffix == ".safetensors":
        inspect_tensors(path, report)
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
    kinds = [k for k in ("dislikes", "likes", "exposed", "withdrawn") if k in counts]
    shares = (f"{counts[k]:,} {k} ({counts[k] / counts['events']:.1%})" for k in kinds)
    report(f"feedback      {', '.join(shares)}")
    report(f"days          {manifest['days']['first']} to {manifest['days']['last']}")
    report(f"split         horizon {split['horizon']} days, valid from {split['valid']}, test from {split['test']}")
    report(f"semantic IDs  {sids['levels']} levels of {sids['codebook']} codes, {sids['quantizer']}")
    _rows(sids["report"], report, indent="  ")
    for number, part in enumerate(dataset.parts, start=1):
        days = part["days"]
        report(
            f"part {number:<8} {part['events']:,} events of {days['first']} to {days['last']},"
            f" {part['new_users']:,} new users"
        )
    dataset.verify()
    for name, record in manifest["files"].items():
        report(f"{name:<28} {record['bytes']:>14,} bytes  ok")


def inspect_run(path: Path, report: Report) -> None:
    """What a run was made of, and its checkpoints, read against their checksums."""
    _rows({"run": str(path), **RunFolder(path).read()}, report)
    for folder in [*sorted((path / "checkpoints").iterdir()), path / "final"]:
        if (folder / STATE).is_file():
            check_checkpoint(folder)
            state = {name: value for name, value in read_state(folder).items() if name != "files"}
            report(f"{folder.relative_to(path)}: {_text(state) if state else 'before the first step'}, files ok")


def inspect_checkpoint(path: Path, report: Report) -> None:
    """A checkpoint's state and its tensors, read against the checksums."""
    check_checkpoint(path)
    _rows({"checkpoint": str(path), **read_state(path)}, report)
    inspect_tensors(path / "policy.safetensors", report)


def inspect_tensors(path: Path, report: Report) -> None:
    """Shapes and types of a safetensors file, each tensor read to its end."""
    total = 0
    try:
        with safe_open(path, framework="pt") as tensors:  # numpy has no bfloat16
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                total += tensor.numel()
                kind = str(tensor.dtype).removeprefix("torch.")
                report(f"{name:<60} {kind:<8} {' x '.join(map(str, tensor.shape))}")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    report(f"{total:,} numbers, {path.stat().st_size:,} bytes")


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
