"""What `negfast inspect` says of a data set, a shard, a table of tensors, a run or a checkpoint."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from negfast.data.dataset import Dataset
from negfast.data.shards import describe_shard
from negfast.errors import InputError
from negfast.runtime.checkpoint import STATE, WEIGHTS, check_checkpoint, read_state
from negfast.runtime.run_folder import RunFolder

Report = Callable[[str], None]
Facts = dict[str, Any]


def describe(path: Path) -> Facts:
    """What lies at ``path``, JSON types, ``kind`` first; checksums are verified where there are any.

    Raises InputError for what is damaged or unknown.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if (path / "run.json").is_file():
        return _run(path)
    if (path / WEIGHTS).is_file():
        check_checkpoint(path)
        tensors = _tensors(path / WEIGHTS)
        return {"kind": "checkpoint", "path": str(path), "state": read_state(path), "tensors": tensors}
    if path.is_dir():
        dataset = Dataset.open(path)
        dataset.verify()
        return {"kind": "data set", "path": str(path), **dataset.manifest}
    if path.suffix == ".safetensors":
        return {"kind": "tensors", "path": str(path), "tensors": _tensors(path)}
    return {"kind": "shard", "path": str(path), **describe_shard(path)}


def report(facts: Facts, say: Report) -> None:
    """What `describe` found, in lines."""
    kind, path = facts["kind"], facts["path"]
    if kind == "data set":
        _report_dataset(facts, say)
    elif kind == "run":
        _rows({"run": path, **{k: v for k, v in facts.items() if k not in ("kind", "path", "checkpoints")}}, say)
        for name, state in facts["checkpoints"].items():
            kept = {key: value for key, value in state.items() if key != "files"}
            say(f"{name}: {_text(kept) if kept else 'before the first step'}, files ok")
    elif kind == "shard":
        _rows({key: value for key, value in facts.items() if key not in ("kind", "path")}, say)
    else:
        if kind == "checkpoint":
            _rows({"checkpoint": path, **facts["state"]}, say)
        for name, tensor in facts["tensors"].items():
            say(f"{name:<60} {tensor['type']:<8} {' x '.join(map(str, tensor['shape']))}")
        numbers = sum(prod(tensor["shape"]) for tensor in facts["tensors"].values())
        say(f"{numbers:,} numbers in {len(facts['tensors']):,} tensors")


def _report_dataset(facts: Facts, say: Report) -> None:
    counts, split, sids = facts["counts"], facts["split"], facts["semantic_ids"]
    say(f"data set      {facts['path']} (format {facts['format']}, negfast {facts['negfast']})")
    for name, source in facts["sources"].items():
        say(f"{name:<13} {source['name']}, {source['bytes']:,} bytes, sha256 {source['sha256'][:16]}...")
    say(f"counts        {counts['events']:,} events, {counts['users']:,} users, {counts['items']:,} items")
    kinds = [k for k in ("dislikes", "likes", "exposed", "withdrawn") if k in counts]
    shares = (f"{counts[k]:,} {k} ({counts[k] / counts['events']:.1%})" for k in kinds)
    say(f"feedback      {', '.join(shares)}")
    say(f"days          {facts['days']['first']} to {facts['days']['last']}")
    say(f"split         horizon {split['horizon']} days, valid from {split['valid']}, test from {split['test']}")
    say(f"semantic IDs  {sids['levels']} levels of {sids['codebook']} codes, {sids['quantizer']}")
    _rows(sids["report"], say, indent="  ")
    for number, part in enumerate(facts.get("parts", []), start=1):
        days = part["days"]
        say(
            f"part {number:<8} {part['events']:,} events of {days['first']} to {days['last']},"
            f" {part['new_users']:,} new users"
        )
    for name, record in facts["files"].items():
        say(f"{name:<28} {record['bytes']:>14,} bytes  ok")


def _run(path: Path) -> Facts:
    """What a run was made of, and its checkpoints, read against their checksums."""
    described, checkpoints = RunFolder(path).read(), {}
    for folder in [*sorted((path / "checkpoints").glob("*")), path / "final"]:
        if (folder / STATE).is_file():
            check_checkpoint(folder)
            checkpoints[str(folder.relative_to(path))] = read_state(folder)
    return {"kind": "run", "path": str(path), **described, "checkpoints": checkpoints}


def _tensors(path: Path) -> dict[str, Facts]:
    """Types and shapes of a safetensors file, each tensor read to its end."""
    found: dict[str, Facts] = {}
    try:
        with safe_open(path, framework="pt") as tensors:  # numpy has no bfloat16
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                found[name] = {"type": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    return found


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
