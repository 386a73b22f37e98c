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

import torch
import triton
import triton.language as tl
from negfast.kernels.attention_tiles import (
    LOG2E,
    attend,
    check_heads,
    dot,
    key_gradients,
    load_rows,
    row_dots,
    store_rows,
)
from negfast.kernels.dispatch import capability, check_tensors, runs_triton
from torch import Tensor


def prompt_attention_reference(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Eager, differentiable, a prompt at a time: query [T, H, D], key and value [T, Hk, D] -> [T, H, D]."""
    repeat = query.shape[1] // key.shape[1]
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=_softmax_dtype(q)).to(q.dtype)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v))
    return torch.cat(outputs)


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None = None
) -> Tensor:
    """Causal attention of B packed prompts.

    query [T, H, D], key and value [T, Hk, D] in bfloat16, float16 or float32, D in 32, 64, 128, H a multiple of Hk;
    cu_seqlens int32 [B + 1] from 0 to T; longest >= the length of every prompt; scale defaults to D ** -0.5.
    Returns [T, H, D], differentiable. Raises ValueError on other shapes, dtypes and devices. On the CPU the reference
    computes, in any dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not runs_triton(query.device):
        return prompt_attention_reference(query, key, value, cu_seqlens, scale)
    check_heads(query, key)
    heads, dim, dtype = key.shape[1], query.shape[2], query.dtype
    shape = (query.shape[0], heads, dim)
    batch = (len(cu_seqlens),)
    check_tensors(
        {
            "key": (key, shape, dtype),
            "value": (value, shape, dtype),
            "cu_seqlens": (cu_seqlens, batch, torch.int32),
        },
        query.device,
    )
    out, _ = _forward(query.contiguous(), key.contiguous(), value.contiguous(), cu_seqlens, longest, scale)
    return out


@torch.library.custom_op("negfast::prompt_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [T, H, D], lse float32 [T, H] in units of log2)"""
    total, heads, dim = query.shape
    out = torch.empty_like(query)
    lse = query.new_empty((total, heads), dtype=torch.float32)
    blocks = forward_blocks(dim, query.dtype, capability(query.device))
    grid = (triton.cdiv(longest, blocks["BLOCK_M"]), heads, len(cu_seqlens) - 1)
    prompt_forward_kernel[grid](
        query, key, value, out, lse, cu_seqlens, scale * LOG2E, heads, key.shape[1], DIM=dim, **blocks
    )
    return out, lse


@_forward.register_fake
def _(query, key, value, cu_seqlens, longest, scale):
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("negfast::prompt_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)"""
    heads, dim = query.shape[1:]
    kv_heads, prompts = key.shape[1], len(cu_seqlens) - 1
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    delta = row_dots(out, grad)
    tensors = (query, key, value, grad, lse, delta)
    shape = dim, query.dtype, capability(query.device)
    blocks = query_blocks(*shape)
    prompt_dq_kernel[(triton.cdiv(longest, blocks["BLOCK_M"]), heads, prompts)](
        *tensors, dq, cu_seqlens, scale, scale * LOG2E, heads, kv_heads, DIM=dim, **blocks
    )
    blocks = key_blocks(*shape)
    prompt_dkdv_kernel[(triton.cdiv(longest, blocks["BLOCK_N"]), kv_heads, prompts)](
        *tensors, dk, dv, cu_seqlens, scale, scale * LOG2E, heads, kv_heads, DIM=dim, **blocks
    )
    return dq, dk, dv


@_backward.register_fake
def _(grad, query, key, value, *_):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx, inputs, output) -> None:
    query, key, value, cu_seqlens, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _differentiate(ctx, grad, _):
    gradients = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scale)
    return (*gradients, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


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
    rows = 64 if target == 90 else 32
    return {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 8 if dim == 128 else 4, "num_stages": 2}


def key_blocks(dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    """Of the kernel that holds dk and dv of a block of keys."""
    if dtype == torch.float32:
        return query_blocks(dim, dtype, target)
    rows, warps = (64, 8) if target == 100 and dim < 128 else (32, 8 if target == 90 or dim == 128 else 4)
    return {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": warps, "num_stages": 2}


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@triton.jit
def prompt_forward_kernel(
    query,
    key,
    value,
    out,
    lse,
    cu_seqlens,
    scale,
    heads,
    kv_heads,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows of blocks first
    head = tl.program_id(1)
    begin = tl.load(cu_seqlens + tl.program_id(2))
    length = tl.load(cu_seqlens + tl.program_id(2) + 1) - begin
    if first_row >= length:
        return
    begin = begin.to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    own = (begin + rows) * heads + head
    q = load_rows(query, own, rows < length, DIM)
    first_key = begin * kv_heads + head // (heads // kv_heads)
    keys, values = key + first_key * DIM, value + first_key * DIM
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    full = first_row // BLOCK_N * BLOCK_N
    for first in range(0, full, BLOCK_N):  # keys before the block: seen by all of its rows
        at = (first + tl.arange(0, BLOCK_N)) * kv_heads
        everywhere = tl.full((BLOCK_N,), True, tl.int1)
        scores = dot(q, load_rows(keys, at, everywhere, DIM)) * scale
        acc, top, total = attend(acc, top, total, scores, load_rows(values, at, everywhere, DIM))
    for first in range(full, tl.minimum(first_row + BLOCK_M, length), BLOCK_N):  # the diagonal
        column = first + tl.arange(0, BLOCK_N)
        at = column * kv_heads
        scores = dot(q, load_rows(keys, at, column < length, DIM)) * scale
        scores = tl.where(column[None, :] <= rows[:, None], scores, -float("inf"))
        acc, top, total = attend(acc, top, total, scores, load_rows(values, at, column < length, DIM))
    store_rows(out, own, acc / total[:, None], rows < length, DIM)
    tl.store(lse + own, top + tl.log2(total), mask=rows < length)


@triton.jit
def prompt_dq_kernel(
    query,
    key,
    value,
    grad,
    lse,
    delta,
    dq,
    cu_seqlens,
    scale,
    scale_log2,
    heads,
    kv_heads,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    begin = tl.load(cu_seqlens + tl.program_id(2))
    length = tl.load(cu_seqlens + tl.program_id(2) + 1) - begin
    if first_row >= length:
        return
    begin = begin.to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    own = (begin + rows) * heads + head
    inside = rows < length
    q = load_rows(query, own, inside, DIM)
    g = load_rows(grad, own, inside, DIM)
    row_lse = tl.load(lse + own, mask=inside, other=0.0)
    row_delta = tl.load(delta + own, mask=inside, other=0.0)
    first_key = begin * kv_heads + head // (heads // kv_heads)
    keys, values = key + first_key * DIM, value + first_key * DIM
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    for first in range(0, tl.minimum(first_row + BLOCK_M, length), BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        at = column * kv_heads
        k = load_rows(keys, at, column < length, DIM)
        v = load_rows(values, at, column < length, DIM)
        p = tl.exp2(dot(q, k) * scale_log2 - row_lse[:, None])
        p = tl.where(column[None, :] <= rows[:, None], p, 0.0)
        ds = p * (dot(g, v) - row_delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    store_rows(dq, own, acc * scale, inside, DIM)


@triton.jit
def prompt_dkdv_kernel(
    query,
    key,
    value,
    grad,
    lse,
    delta,
    dk,
    dv,
    cu_seqlens,
    scale,
    scale_log2,
    heads,
    kv_heads,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_key = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    begin = tl.load(cu_seqlens + tl.program_id(2))
    length = tl.load(cu_seqlens + tl.program_id(2) + 1) - begin
    if first_key >= length:
        return
    begin = begin.to(tl.int64)
    column = first_key + tl.arange(0, BLOCK_N)
    own = (begin + column) * kv_heads + kv_head
    here = column < length
    k = load_rows(key, own, here, DIM)
    v = load_rows(value, own, here, DIM)
    dk_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    repeat = heads // kv_heads
    for head in range(kv_head * repeat, (kv_head + 1) * repeat):
        for first in range(first_key // BLOCK_M * BLOCK_M, length, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < length
            at = (begin + rows) * heads + head
            q = load_rows(query, at, inside, DIM)
            g = load_rows(grad, at, inside, DIM)
            row_lse = tl.load(lse + at, mask=inside, other=float("inf"))
            row_delta = tl.load(delta + at, mask=inside, other=0.0)
            visible = column[:, None] <= rows[None, :]
            dk_acc, dv_acc, _ = key_gradients(dk_acc, dv_acc, k, v, q, g, row_lse, row_delta, visible, scale_log2)
    store_rows(dk, own, dk_acc * scale, here, DIM)
    store_rows(dv, own, dv_acc, here, DIM)
