"""What this machine gives a process: its device and CPU threads (`negfast.memory` has the memory)."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress

import torch

from negfast.errors import InputError
from negfast.memory import CGROUP
from negfast.runtime import distributed


def choose_device(name: str) -> torch.device:
    """The device of ``train.device``: "auto" takes CUDA where there is one. InputError where it is not to be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"train.device: found {name!r}, expected auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"train.device: found {name!r}, expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device: found cuda, but this machine has no usable CUDA device")
    if device.index is not None:
        torch.cuda.set_device(device)  # where kernels are launched and streams are taken from
    return device


def use_threads(count: int) -> None:
    """Sets the CPU threads of `train.threads`. 0 takes OMP_NUM_THREADS where it is set, else all CPUs that affinity and
    the cgroup's quota allow, shared with the other ranks of this machine."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if not count and wanted.isdecimal() and int(wanted):
        count = int(wanted)
    torch.set_num_threads(count or max(1, allowed_cpus() // distributed.local_size()))


def allowed_cpus() -> int:
    """CPUs that this process may use: by affinity, and by the quota of its cgroup (version 2, else 1), rounded up."""
    allowed = len(os.sched_getaffinity(0))
    for quota, period in _cgroup_quotas():
        if quota > 0 < period:
            allowed = min(allowed, max(1, math.ceil(quota / period)))
    return allowed


def _cgroup_quotas() -> Iterator[tuple[int, int]]:
    """(quota, period) of CPU time in microseconds, as the container sees them; none where there is no limit."""
    for paths in ((CGROUP / "cpu.max",), (CGROUP / "cpu/cpu.cfs_quota_us", CGROUP / "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            quota, period = (int(number) for path in paths for number in path.read_text().split())
            yield quota, period
