"""The benchmark's systems do the same work: what each returns is compared at small sizes."""

import pytest
import torch
from cases import relative_error

from bench.attention_cases import answer_case, prompt_case
from bench.row_cases import cross_entropy_case, trie_grpo_case, vocabulary_case


@pytest.mark.parametrize(
    "case",
    [
        trie_grpo_case(32, 256, torch.float32),
        trie_grpo_case(32, 100, torch.bfloat16),
        cross_entropy_case(32, 256, torch.float32),
        vocabulary_case(5, 3001),
        prompt_case(2, 40, 4, 2, 32, False),
        prompt_case(2, 40, 4, 2, 32, True),
        answer_case(2, 3, 40, 1, 4, 2, 32, False),
        answer_case(2, 3, 40, 3, 4, 2, 32, True),
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
