"""The benchmark's systems do the same work: what each returns is compared at small sizes."""

import pytest
import torch

from bench.kernel_cases.completion_attention import completion_attention_case
from bench.kernel_cases.prompt_attention import prompt_attention_case
from bench.kernel_cases.sid_cross_entropy import sid_cross_entropy_case
from bench.kernel_cases.trie_grpo import trie_grpo_case
from bench.kernel_cases.vocabulary_cross_entropy import vocabulary_cross_entropy_case
from tests.kernels.cases import relative_error


@pytest.mark.parametrize(
    "case",
    [
        trie_grpo_case(32, 256, torch.float32),
        trie_grpo_case(32, 100, torch.bfloat16),
        sid_cross_entropy_case(32, 256, torch.float32),
        vocabulary_cross_entropy_case(5, 3001),
        prompt_attention_case(2, 40, 4, 2, 32, False),
        prompt_attention_case(2, 40, 4, 2, 32, True),
        completion_attention_case(2, 3, 40, 1, 4, 2, 32, False),
        completion_attention_case(2, 3, 40, 3, 4, 2, 32, True),
        completion_attention_case(2, 7, 40, 2, 4, 2, 32, False, "spread"),
        completion_attention_case(2, 7, 40, 1, 4, 2, 32, True, "spread"),
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
