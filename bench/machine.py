"""What a result says about the machine it was made on, and how it is kept."""

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
    """Writes a result as JSON, whole or not at all; a figure that is not finite raises ValueError."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
