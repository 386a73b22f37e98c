"""The memory that this machine, or the control group that a container is, gives a process."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


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
