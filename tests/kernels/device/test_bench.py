"""The benchmark's systems do the same work: what each returns is compared at small sizes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from cases import relative_error

ROOT = Path(__file__).parents[3]
spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "bench" / "kernels.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.mark.parametrize(
    "case",
    [
        bench.trie_grpo_case(64, 256, torch.float32),
        bench.trie_grpo_case(32, 100, torch.bfloat16),
        bench.cross_entropy_case(32, 256, torch.float32),
        bench.prompt_case(2, 40, 4, 2, 32, False),
        bench.prompt_case(2, 40, 4, 2, 32, True),
        bench.answer_case(2, 3, 40, 1, 4, 2, 32, False),
        bench.answer_case(2, 3, 40, 3, 4, 2, 32, True),
    ],
    ids=lambda case: f"{case.kernel}-{case.shape.get('pass', case.shape.get('dtype'))}",
)
def test_systems_agree(case, device: torch.device):
    systems = case.build(device)
    expected = systems["negfast"]()
    assert len(systems) > 1
    allowed = 1e-5 if case.shape.get("dtype") == "float32" else 1e-2
    for name, call in systems.items():
        if "(no trie" not in name:
            assert relative_error(call(), expected) < allowed, name
