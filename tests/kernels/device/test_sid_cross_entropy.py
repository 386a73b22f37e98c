"""The fused cross entropy over trie rows against float64: never further off than eager code in the same dtype."""

from dataclasses import replace

import pytest
import torch
from cases import TrieCase, relative_error, trie_case
from negfast.kernels import sid_cross_entropy as module
from negfast.kernels.sid_cross_entropy import eager, launch, sid_cross_entropy

NAMES = ("loss", "log_prob", "dlogits")
ROUNDING = 3e-6


def inputs(case: TrieCase) -> tuple:
    """Targets are the case's sampled codes; forced ones get no weight, as padding does not."""
    weight = case.answer_weight.repeat(len(case.code)) * case.counted.flatten()
    return case.logits, case.tables, case.rows, case.tokens, case.code.flatten(), weight


def check(case: TrieCase) -> None:
    truth, expected = eager(*inputs(case.to(torch.float64))), eager(*inputs(case))
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        found = launch(*inputs(case))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, kernel, plain, right in zip(NAMES, found, expected, truth, strict=True):
        assert kernel.shape == plain.shape and kernel.dtype == plain.dtype, name
        error, allowed = relative_error(kernel, right), relative_error(plain, right)
        assert error <= 1.1 * allowed + ROUNDING, f"{name}: {error:.2e}, eager {allowed:.2e}"


def test_an_odd_number_of_rows(device: torch.device, seed: int):
    check(trie_case(seed, device, group=9, codebook=40, items=300, rows=123, merge=False, dtype=torch.bfloat16))


@pytest.mark.parametrize("codebook", [1, 2, 33, 507, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_codebooks(codebook: int, dtype: torch.dtype, device: torch.device, seed: int):
    check(trie_case(seed, device, prompts=2, group=3, codebook=codebook, items=min(codebook**3, 300), dtype=dtype))


@pytest.mark.parametrize("with_prior", [True, False], ids=["prior", "no-prior"])
def test_many_targets_share_a_row(with_prior: bool, device: torch.device, seed: int):
    check(trie_case(seed, device, prompts=2, group=40, codebook=6, with_prior=with_prior))


def test_the_gradient_arrives_at_the_logits(device: torch.device, seed: int):
    case = trie_case(seed, device)
    logits = case.logits.clone().requires_grad_()
    loss, _ = sid_cross_entropy(logits, *inputs(case)[1:])
    (2 * loss).backward()
    torch.testing.assert_close(logits.grad, 2 * launch(*inputs(case))[2])


def test_operator_is_registered_for_compilation(device: torch.device, seed: int):
    case = trie_case(seed, device, prompts=1, group=2)
    captured = []
    operator = module._op
    try:
        module._op = lambda *arguments: captured.append(arguments) or operator(*arguments)
        sid_cross_entropy(*inputs(case))
    finally:
        module._op = operator
    logits = captured[0][0].clone().requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator, (logits, *captured[0][1:]), test_utils=checks)


def test_a_target_that_is_not_valid_is_an_infinite_loss(device: torch.device, seed: int):
    case = trie_case(seed, device, prompts=1, group=1, levels=1, codebook=16, items=6)
    request, prefix = case.row_prefix[0]
    missing = min(set(range(16)) - set(case.trie.choices(prefix, case.request_seen[request])))
    arguments = list(inputs(case))
    arguments[4] = torch.full_like(case.code.flatten(), missing)
    arguments[5] = torch.ones_like(arguments[5])
    loss, log_prob = sid_cross_entropy(*arguments)
    assert loss == torch.inf and log_prob[0] == -torch.inf


def test_what_is_unsupported_raises(device: torch.device, seed: int):
    case = trie_case(seed, device)
    with pytest.raises(ValueError, match=r"logits: found torch\.float64"):
        sid_cross_entropy(*inputs(case.to(torch.float64)))
    with pytest.raises(ValueError, match="weight: found shape"):
        sid_cross_entropy(*inputs(case)[:5], case.answer_weight)
    with pytest.raises(ValueError, match="mass_row: found None"):
        sid_cross_entropy(*inputs(replace(case, rows=replace(case.rows, mass_row=None))))
