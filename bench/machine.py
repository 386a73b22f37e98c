"""The machine that a result was made on, and how a result is written."""

import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from negfast.files import atomic_file


def device_name() -> str:
    """The processor and the cores that this process may use."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {len(os.sched_getaffinity(0))} cores"
    return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def resident_mib(peak: bool = False) -> float:
    """Resident memory of this process now, or at its peak. (getrusage counts the parent's too after a spawn.)"""
    name = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status: found no {name}")


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON with one row a line; a figure that is not finite raises ValueError."""
    with atomic_file(path) as temporary:
        temporary.write_text(_laid_out(result) + "\n", "utf-8")


def _laid_out(value: Any) -> str:
    """A line for each row of a list of objects and for each key of what holds such a list; the rest is compact."""
    if isinstance(value, dict) and any(_has_rows(part) for part in value.values()):
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {_laid_out(part)}" for key, part in value.items()) + "\n}"
    if _is_rows(value):
        return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in value) + "\n]"
    return json.dumps(value, allow_nan=False)


def _has_rows(value: Any) -> bool:
    return _is_rows(value) or (isinstance(value, dict) and any(map(_has_rows, value.values())))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict)
