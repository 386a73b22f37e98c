"""Causal attention of packed prompts of ragged length, forward and backward: the first half of group attention.

For query i of a prompt, head h and its kv head, over keys j <= i of the same prompt:

    s_ij = scale q_i . k_j,   p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij),   o_i = sum_j p_ij v_j

and with the gradient g of o, delta_i = g_i . o_i (for sum_j p_ij dp_ij = delta_i):

    dp_ij = g_i . v_j,   ds_ij = p_ij (dp_ij - delta_i)
    dv_j = sum_i p_ij g_i,   dk_j = scale sum_i ds_ij q_i,   dq_i = scale sum_j ds_ij k_j

sums over i running over all query heads of the kv head (GQA). The forward is online softmax over key blocks. In the
backward one kernel owns blocks of queries (dq) and one owns blocks of keys (dk, dv), each recomputing p from lse:
nothing is added atomically, so runs are bit-equal. Exponents are base 2, log2(e) folded into the scale.

FLOPs for lengths P_b: forward 4 H D sum_b P_b^2 / 2, backward 14 H D sum_b P_b^2 / 2 (7 products instead of 5 pay for
order). Bytes: q, o, and k, v once each, forward 2 T (H + Hk) D elements, backward 3 T (H + Hk) D and lse; beyond about
P = 300 (bf16, H100) the matrix units bound it.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from negfast.kernels.attention_inputs import Segments, check_heads
from negfast.kernels.attention_kernel import LOG2E, row_dots
from negfast.kernels.dispatch import capability, check_tensors, runs_triton
from negfast.kernels.operators import operator
from negfast.kernels.prompt_attention_kernel import prompt_dkdv_kernel, prompt_dq_kernel, prompt_forward_kernel
from negfast.kernels.prompt_attention_reference import prompt_attention_reference


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, prompts: Segments, scale: float | None = None
) -> Tensor:
    """Causal attention of B packed prompts.

    query [T, H, D], key and value [T, Hk, D] in bfloat16, float16 or float32, D in 32, 64, 128, H a multiple of Hk;
    prompts: segments of the T tokens; scale defaults to D ** -0.5.
    Returns [T, H, D], differentiable. Raises ValueError on other shapes, dtypes and devices. On the CPU the reference
    computes, in any dtype.
    """
    if not runs_triton(query.device, "attention"):
        return prompt_attention_reference(query, key, value, prompts, scale)
    check_heads(query, key)
    shape = (query.shape[0], key.shape[1], query.shape[2])
    expected = {
        "key": (key, shape, query.dtype),
        "value": (value, shape, query.dtype),
        "prompts.offsets": (prompts.offsets, (prompts.count + 1,), torch.int32),
    }
    check_tensors(expected, query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return PromptAttention.apply(query.contiguous(), key.contiguous(), value.contiguous(), prompts, scale)


class PromptAttention(torch.autograd.Function):
    """The output for query, key and value; the backward rebuilds the weights from lse."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, prompts: Segments, scale: float) -> Tensor:
        out, lse = _forward(query, key, value, prompts.offsets, prompts.longest, scale)
        ctx.save_for_backward(query, key, value, out, lse, prompts.offsets)
        ctx.longest, ctx.scale = prompts.longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scale), None, None


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [T, H, D], lse float32 [T, H] in units of log2)"""
    total, heads, dim = query.shape
    out = torch.empty_like(query)
    lse = query.new_empty((total, heads), dtype=torch.float32)
    blocks = forward_blocks(dim, query.dtype, capability(query.device))
    grid = (triton.cdiv(longest, blocks["BLOCK_M"]), heads, len(offsets) - 1)
    prompt_forward_kernel[grid](
        query, key, value, out, lse, offsets, scale * LOG2E, heads, key.shape[1], DIM=dim, **blocks
    )
    return out, lse


def launch_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)"""
    heads, dim = query.shape[1:]
    kv_heads, prompts = key.shape[1], len(offsets) - 1
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    delta = row_dots(out, grad)
    tensors = (query, key, value, grad, lse, delta)
    shape = dim, query.dtype, capability(query.device)
    blocks = query_blocks(*shape)
    prompt_dq_kernel[(triton.cdiv(longest, blocks["BLOCK_M"]), heads, prompts)](
        *tensors, dq, offsets, scale, scale * LOG2E, heads, kv_heads, DIM=dim, **blocks
    )
    blocks = key_blocks(*shape)
    prompt_dkdv_kernel[(triton.cdiv(longest, blocks["BLOCK_N"]), kv_heads, prompts)](
        *tensors, dk, dv, offsets, scale, scale * LOG2E, heads, kv_heads, DIM=dim, **blocks
    )
    return dq, dk, dv


def _fake_forward(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_forward = operator("prompt_attention", launch_forward, _fake_forward)
_backward = operator("prompt_attention_backward", launch_backward, _fake_backward)


def forward_blocks(dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    """Blocks that leave no register spilled (tools/compile_kernels.py); ``target`` as 90 for sm_90."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    if target in (90, 100) or dim < 128:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def query_blocks(dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    if target == 90:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8 if dim == 128 else 4, "num_stages": 2}


def key_blocks(dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    """Of the kernel that holds dk and dv of a block of keys. On sm_90 a warpgroup multiplies 64 rows of a block at
    once: 128 keys give each of two warpgroups whole rows, so that no product is narrower than 32 columns."""
    if dtype == torch.float32:
        return query_blocks(dim, dtype, target)
    if target == 90:
        return {"BLOCK_M": 32 if dim == 128 else 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    rows = 64 if target == 100 and dim < 128 else 32
    return {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
