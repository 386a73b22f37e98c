"""Attention against float64: the output and every gradient never further off than eager code in the same dtype."""

from collections.abc import Callable

import torch

from negfast.kernels.attention_inputs import Segments
from tests.kernels.cases import AttentionCase, relative_error

ROUNDING = 3e-6


def gradients(attention: Callable, case: AttentionCase, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and the gradients of every tensor, for a fixed random gradient of the output."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in case.tensors]
    out = attention(*leaves, *case.layout)
    return [out, *torch.autograd.grad(out, leaves, case.grad.to(dtype))]


def check(case: AttentionCase, kernel: Callable, reference: Callable) -> None:
    dtype = case.tensors[0].dtype
    truth, eager = gradients(reference, case, torch.float64), gradients(reference, case, dtype)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        found = gradients(kernel, case, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    for n, (kernel_out, eager_out, right) in enumerate(zip(found, eager, truth, strict=True)):
        name = "out" if n == 0 else f"gradient of tensor {n - 1}"
        assert kernel_out.shape == right.shape and kernel_out.dtype == dtype, name
        error, allowed = relative_error(kernel_out, right), relative_error(eager_out, right)
        assert error <= 1.1 * allowed + ROUNDING, f"{name}: {error:.2e}, eager {allowed:.2e}"


def check_bits(case: AttentionCase, kernel: Callable) -> None:
    """Two runs have the same bits."""
    first, again = (gradients(kernel, case, case.tensors[0].dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def check_operators(case: AttentionCase, name: str) -> None:
    """Both operators of a kernel are what their schemas and fake tensors say."""
    rows = [part.offsets if isinstance(part, Segments) else part for part in case.layout]
    longest = [part.longest for part in case.layout if isinstance(part, Segments)]
    forward, backward = (getattr(torch.ops.negfast, op).default for op in (name, f"{name}_backward"))
    rest = (*rows, *longest, 0.2)
    out, lse = forward(*case.tensors, *rest)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (*case.tensors, *rest), test_utils=checks)
    torch.library.opcheck(backward, (case.grad, *case.tensors, out, lse, *rest), test_utils=checks)
