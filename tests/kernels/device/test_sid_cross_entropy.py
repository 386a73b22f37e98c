"""The fused cross entropy over trie rows against float64: never further off than eager code in the same dtype."""

from dataclasses import replace

import pytest
import torch

from negfast.kernels import dispatch
from negfast.kernels.sid_cross_entropy import sid_cross_entropy
from negfast.kernels.trie_rows import row_inputs
from tests.kernels.cases import TrieCase, relative_error, trie_case

ROUNDING = 3e-6


def inputs(case: TrieCase) -> tuple:
    """A row's target is the first code sampled there; padding rows ask for code 0."""
    start = case.tokens.start.long()
    first = case.tokens.token[start[:-1].clamp(max=len(case.tokens.token) - 1)].long()
    code = torch.where(start.diff() > 0, case.tokens.code.flatten()[first], 0)
    return case.logits, case.tables, case.rows, code.int()


def gradient(grad: torch.Tensor, logits: torch.Tensor, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    nll = sid_cross_entropy(leaf, *rest)
    return nll.detach(), torch.autograd.grad(nll, leaf, grad.to(nll.dtype))[0]


def check(case: TrieCase) -> None:
    grad = torch.randn(len(case.logits)).to(case.logits.device)
    with dispatch.eager():
        truth, expected = gradient(grad, *inputs(case.to(torch.float64))), gradient(grad, *inputs(case))
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        found = gradient(grad, *inputs(case))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, kernel, plain, right in zip(("nll", "dlogits"), found, expected, truth, strict=True):
        assert kernel.shape == plain.shape and kernel.dtype == plain.dtype, name
        error, allowed = relative_error(kernel, right), relative_error(plain, right)
        assert error <= 1.1 * allowed + ROUNDING, f"{name}: {error:.2e}, eager {allowed:.2e}"


@pytest.mark.parametrize("rows", [252, 507, 123])
def test_odd_numbers_of_rows(rows: int, device: torch.device, seed: int):
    """The last of them are padding."""
    check(trie_case(seed, device, group=9, codebook=40, items=300, rows=rows, merge=False, dtype=torch.bfloat16))


@pytest.mark.parametrize("codebook", [1, 2, 33, 507, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_codebooks(codebook: int, dtype: torch.dtype, device: torch.device, seed: int):
    check(trie_case(seed, device, prompts=2, group=3, codebook=codebook, items=min(codebook**3, 300), dtype=dtype))


@pytest.mark.parametrize("with_prior", [True, False], ids=["prior", "no-prior"])
def test_single_children_and_pruned_nodes(with_prior: bool, device: torch.device, seed: int):
    check(trie_case(seed, device, levels=4, codebook=64, items=40, prompts=2, with_prior=with_prior))


def test_rows_without_a_valid_code_cost_nothing(device: torch.device, seed: int):
    case = trie_case(seed, device, rows=60)
    nll, dlogits = gradient(torch.ones(60, device=device), *inputs(case))
    padding = slice(len(case.row_prefix), None)
    assert len(nll[padding]) and (nll[padding] == 0).all() and (dlogits[padding] == 0).all()


def test_operators_are_registered_for_compilation(device: torch.device, seed: int):
    logits, tables, rows, code = inputs(trie_case(seed, device, prompts=1, group=2))
    arguments = (logits, code, row_inputs(logits, tables, rows), tables.weight)
    grad = torch.randn(len(logits)).to(device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.negfast.sid_cross_entropy.default, arguments, test_utils=checks)
    backward = torch.ops.negfast.sid_cross_entropy_backward.default
    torch.library.opcheck(backward, (grad, *arguments), test_utils=checks)


def test_a_target_that_is_not_valid_is_an_infinite_loss(device: torch.device, seed: int):
    case = trie_case(seed, device, prompts=1, group=1, levels=1, codebook=16, items=6)
    request, prefix = case.row_prefix[0]
    missing = min(set(range(16)) - set(case.trie.choices(prefix, case.request_seen[request])))
    logits, tables, rows, code = inputs(case)
    assert sid_cross_entropy(logits, tables, rows, torch.full_like(code, missing))[0] == torch.inf


def test_what_is_unsupported_raises(device: torch.device, seed: int):
    case = trie_case(seed, device)
    logits, tables, rows, code = inputs(case)
    with pytest.raises(ValueError, match=r"logits: found torch\.float64"):
        sid_cross_entropy(logits.double(), tables, rows, code)
    with pytest.raises(ValueError, match="code: found shape"):
        sid_cross_entropy(logits, tables, rows, code[1:])
    with pytest.raises(ValueError, match="log_mass and mass_start: found one"):
        sid_cross_entropy(logits, tables, replace(rows, mass_start=None), code)
    wide = torch.zeros(len(logits), 8193, device=device)
    with pytest.raises(ValueError, match="child_bits: found shape"):
        sid_cross_entropy(wide, tables, rows, code)
