"""The memory that this machine, or the control group that a container is, gives a process."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from negfast.errors import InputError

CGROUP = Path("/sys/fs/cgroup")
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(option: str, text: str) -> int:
    """Bytes of a text like 4GB, 1.5GiB or 800MB. Raises InputError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT]i?B)\s*", text, re.IGNORECASE)
    if found is None:
        raise InputError(f"{option} {text!r}: expected a size like 4GB, 1.5GiB or 800MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def total_memory() -> int:
    """Bytes installed, or those of the control group's limit where it has a lower one."""
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _limits())])


def available_memory() -> int:
    """Bytes that can still be had, by the kernel's estimate and within the control group's limit."""
    return min([_meminfo("MemAvailable"), *(max(0, limit - used) for limit, used in _limits())])


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo: found no {name}")


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of the control group, version 2 or 1; what could be freed, such as cached files, is not
    used. None where there is no limit."""
    for limit, used, freeable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError, KeyError):  # "max" is no number: no limit
            most = int((CGROUP / limit).read_text())
            stat = dict(line.split() for line in (CGROUP / limit).with_name("memory.stat").read_text().splitlines())
            yield most, int((CGROUP / used).read_text()) - int(stat[freeable])
