"""The addition to a decoder's residual stream and the RMSNorm that follows, forward and backward.

    s = x + b,   r = 1 / sqrt(mean_j s_j^2 + eps),   y = w s r

and with the gradients g of y and h of s

    dx = db = r (w g - s r mean_j(w_j g_j s_j r)) + h,   dw = sum over rows of g s r

y has the dtype of the products that it feeds, so nothing is rounded by another pass; statistics are float32. The
stream may be bfloat16: then s is rounded before it is normed, as the backward finds it. The backward's programs each
sum dw over their rows, and the sums are added in order: runs are bit-equal.

Bytes of an element with x in a bytes, b and y in 2: forward 2 a + 4 (read x and b, write s and y), backward 3 a + 4
(read g, s and h, write dx and db), or 8 where a is 2 and db is dx. Memory bounds both.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from negfast.kernels.add_norm_kernel import add_norm_backward_kernel, add_norm_kernel
from negfast.kernels.add_norm_reference import add_norm_reference
from negfast.kernels.dispatch import check_tensors, processors, runs_triton
from negfast.kernels.operators import operator

WIDEST = 16_384  # elements of a row, which a program holds in registers


def add_norm(
    stream: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(sum, normed) of a stream [..., d] and what a layer adds to it, None for nothing.

    stream, branch  float32, bfloat16 or float16, each its own; the sum has the stream's
    weight  [d] of any of these; dtype: of ``normed``

    Differentiable. Raises ValueError on other shapes and devices. On the CPU the reference computes, in any dtype.
    """
    if not runs_triton(stream.device, "liger"):
        return add_norm_reference(stream, branch, weight, eps, dtype)
    size = stream.shape[-1]
    if size > WIDEST:
        raise ValueError(f"stream: found rows of {size}, expected at most {WIDEST}")
    expected: dict[str, Any] = {"weight": (weight, (size,), weight.dtype)}
    if branch is not None:
        expected["branch"] = branch, tuple(stream.shape), branch.dtype
    check_tensors(expected, stream.device)
    stream = stream.contiguous()
    if branch is None:
        return stream, AddNorm.apply(stream, None, weight, eps, dtype)[1]
    return AddNorm.apply(stream, branch.contiguous(), weight, eps, dtype)


class AddNorm(torch.autograd.Function):
    """Sum and normed; the sum is empty where nothing is added."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total, normed, rstd = _forward(stream, branch, weight, eps, dtype)
        ctx.save_for_backward(stream if branch is None else total, weight, rstd)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        grads = [None if x is None else x.contiguous() for x in (grad, total_grad)]
        if ctx.branch_dtype is None:
            grads[1] = None  # of nothing
        if grads[0] is None:
            grads[0] = torch.zeros_like(total)
        dstream, dbranch, dweight = _backward(*grads, total, weight, rstd, ctx.branch_dtype)
        if ctx.branch_dtype == total.dtype:
            dbranch = dstream
        return dstream, None if ctx.branch_dtype is None else dbranch, dweight, None, None


def launch_forward(
    stream: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, normed, 1 / root mean square float32 [N]); the sum is empty where nothing is added"""
    size = stream.shape[-1]
    rows = stream.numel() // size
    total = stream.new_empty(0) if branch is None else torch.empty_like(stream)
    normed, rstd = torch.empty_like(stream, dtype=dtype), stream.new_empty(rows, dtype=torch.float32)
    if rows:
        sums = None if branch is None else total
        add_norm_kernel[(rows,)](stream, branch, weight, sums, normed, rstd, eps, size, **row_block(size))
    return total, normed, rstd


def launch_backward(
    grad: Tensor,
    total_grad: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dstream, dbranch, dweight); dbranch is empty where it is none or equal to dstream"""
    size, rows = total.shape[-1], len(rstd)
    dstream, dbranch = torch.empty_like(total), None
    if branch_dtype not in (None, total.dtype):
        dbranch = torch.empty_like(total, dtype=branch_dtype)
    programs = min(rows, PROGRAMS * processors(total.device))
    dweight = total.new_empty((programs, size), dtype=torch.float32)
    if rows:
        add_norm_backward_kernel[(programs,)](
            grad, total_grad, total, weight, rstd, dstream, dbranch, dweight, rows, size, **row_block(size)
        )
    return dstream, total.new_empty(0) if dbranch is None else dbranch, dweight.sum(0).to(weight.dtype)


PROGRAMS = 8  # of the backward on a multiprocessor


def _fake_forward(
    stream: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    total = stream.new_empty(0) if branch is None else torch.empty_like(stream)
    rows = stream.numel() // stream.shape[-1]
    return total, torch.empty_like(stream, dtype=dtype), stream.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    grad: Tensor, total_grad: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, branch: torch.dtype | None
) -> tuple[Tensor, ...]:
    dbranch = total.new_empty(0) if branch in (None, total.dtype) else torch.empty_like(total, dtype=branch)
    return torch.empty_like(total), dbranch, torch.empty_like(weight)


_forward = operator("add_norm", launch_forward, _fake_forward)
_backward = operator("add_norm_backward", launch_backward, _fake_backward)


def row_block(size: int) -> dict[str, int]:
    block = max(triton.next_power_of_2(size), 16)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}
