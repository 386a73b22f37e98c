"""Every kernel compiles ahead of time for A100, H100 and B200, and spills no register with the blocks it chooses."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from triton.runtime import driver

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "compile_kernels.py"
KERNELS = ("trie_grpo", "sid_cross_entropy", "prompt_attention", "completion_attention", "add_norm")
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227}  # a block can have
MATRIX_UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}  # its instructions


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[str, subprocess.Popen]]:
    """The tool in a process a target, started together: compiling takes no GPU, but TRITON_INTERPRET unset."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    started = {}
    for target in SHARED_KIB:
        command = [sys.executable, str(TOOL), "--target", target[3:], "--defaults", "--json"]
        started[target] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def resources(compilations: dict[str, subprocess.Popen]) -> dict[str, list[dict]]:
    """By target."""
    found = {}
    for target, process in compilations.items():
        out, err = process.communicate(timeout=600)
        assert out, err
        found[target] = json.loads(out)
    return found


@pytest.mark.parametrize("target", SHARED_KIB)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(kernel: str, target: str, resources: dict[str, list[dict]]):
    found = [r for r in resources[target] if r["family"] == kernel]
    assert found
    for r in found:
        assert r["target"] == target
        assert (r["spills"], r["stack"]) == (0, 0), r
        assert r["registers"] <= 255 and r["shared"] <= SHARED_KIB[target] * 1024, r
    if kernel.endswith("attention"):
        assert MATRIX_UNIT[target] in {r["tensor_core"] for r in found}


def test_products_of_prompt_attention_fill_a_warpgroup(resources: dict[str, list[dict]]):
    """On sm_90 a product narrower than 32 columns leaves most of the matrix unit idle."""
    found = [r for r in resources["sm_90"] if r["family"] == "prompt_attention" and r["kernel"] != "row_dots_kernel"]
    assert len(found) == 2 * 3  # heads of 64 and 128 dimensions
    assert min(r["narrowest"] for r in found) >= 32, found


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("compile_kernels", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_kernels"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", None)  # it puts its own there
        yield module


def test_a_launch_finds_what_was_compiled_ahead(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By tensors that have memory, in another process as far as Triton knows."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = [launch for kernel in KERNELS for launch in tool.launches_for(kernel, 90)[:1]]
    for launch in launches:
        tool.compile_launch("", launch, 90)
    compiled = sorted(tmp_path.iterdir())
    for launch in launches:
        launch.kernel.device_caches.clear()
        arguments = (torch.empty(64, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for x in launch.arguments)
        launch.kernel.run(*arguments, grid=launch.grid, warmup=True, **launch.options)
    assert len(compiled) >= len(launches) and sorted(tmp_path.iterdir()) == compiled


def test_every_kernel_is_compiled(tool: ModuleType):
    """No kernel that is launched is missing from the tool."""
    assert tuple(tool.KERNELS) == KERNELS
    launched = {launch.name for kernel in KERNELS for launch in tool.launches_for(kernel, 90)}
    written = set()
    for path in (ROOT / "kernels").glob("*.py"):
        written |= {line.split("(")[0][4:] for line in path.read_text().splitlines() if line.startswith("def ")}
    assert launched == {name for name in written if name.endswith("_kernel")}
