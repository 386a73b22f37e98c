"""What a process may use of its machine: affinity, quotas, OMP_NUM_THREADS and memory are honoured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from negfast import cli, memory
from negfast.runtime import machine


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


@pytest.mark.parametrize(("quota", "cpus"), [("max 100000", 8), ("150000 100000", 2), ("20000 100000", 1)])
def test_the_quota_of_a_cgroup_of_version_2(cgroup: Path, quota: str, cpus: int):
    (cgroup / "cpu.max").write_text(quota + "\n")
    assert machine.allowed_cpus() == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 8), ("250000", 3)])
def test_the_quota_of_a_cgroup_of_version_1(cgroup: Path, quota: str, cpus: int):
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu/cpu.cfs_quota_us").write_text(quota)
    (cgroup / "cpu/cpu.cfs_period_us").write_text("100000")
    assert machine.allowed_cpus() == cpus


def test_threads_are_those_asked_for_then_those_of_openmp_then_those_allowed(cgroup: Path, monkeypatch):
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.use_threads(5)
    machine.use_threads(0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.use_threads(0)
    assert found == [5, 3, 8]


@pytest.mark.parametrize(
    ("limit", "used", "freeable"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_memory_of_a_cgroup(cgroup: Path, limit: str, used: str, freeable: str):
    installed, free = memory.total_memory(), memory.available_memory()
    assert 0 < free < installed
    (cgroup / "memory").mkdir()
    (cgroup / used).write_text("50000000\n")
    (cgroup / limit).with_name("memory.stat").write_text(f"anon 1\n{freeable} 20000000\n")
    (cgroup / limit).write_text("90000000\n")
    assert (memory.total_memory(), memory.available_memory()) == (90_000_000, 60_000_000)
    (cgroup / limit).write_text("max\n")
    assert memory.total_memory() == installed


@pytest.mark.parametrize(
    ("load", "given", "found"),
    [("2/90", None, "PASSIVE"), ("1/90", None, None), ("5/90", "ACTIVE", "ACTIVE"), (None, None, None)],
)
def test_idle_threads_wait_passively_beside_others(
    load: str, given: str | None, found: str | None, tmp_path, monkeypatch
):
    if load is not None:
        (tmp_path / "loadavg").write_text(f"0.00 0.01 0.05 {load} 4711\n")
    monkeypatch.setattr(cli, "LOAD", tmp_path / "loadavg")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "none")]).exit_code == 2
    assert os.environ.get("OMP_WAIT_POLICY") == found
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_the_command_line_loads_no_torch():
    asked = "import negfast.cli, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", asked], check=True)
