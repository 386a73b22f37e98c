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
from negfast.kernels.dispatch import capability, check_tensors, runs_triton
from torch import Tensor

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2E = 1.4426950408889634


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


def check_heads(query: Tensor, key: Tensor) -> None:
    """Raise ValueError on a head dimension, dtype or ratio of heads that the kernels do not take."""
    if query.dtype not in DTYPES:
        raise ValueError(f"query: found {query.dtype}, expected bfloat16, float16 or float32")
    if query.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"head dimension: found {query.shape[-1]}, expected one of {HEAD_DIMS}")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(f"query heads: found {query.shape[-2]}, expected a multiple of the {key.shape[-2]} kv heads")


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
    blocks = backward_blocks(dim, query.dtype, capability(query.device))
    prompt_dq_kernel[(triton.cdiv(longest, blocks["BLOCK_M"]), heads, prompts)](
        *tensors, dq, cu_seqlens, scale, scale * LOG2E, heads, kv_heads, DIM=dim, **blocks
    )
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


def row_dots(out: Tensor, grad: Tensor) -> Tensor:
    """float32 [..., H]: the dot product of each row of out and grad [..., H, D]."""
    rows, dim = out.numel() // out.shape[-1], out.shape[-1]
    dots = out.new_empty(out.shape[:-1], dtype=torch.float32)
    row_dots_kernel[(triton.cdiv(rows, 32),)](out, grad, dots, rows, DIM=dim, BLOCK=32, num_warps=4)
    return dots


def forward_blocks(dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    """Blocks that leave no register spilled (tools/compile_kernels.py); ``target`` as 90 for sm_90."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    if target in (90, 100) or dim < 128:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


def backward_blocks(dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    rows = 64 if target == 90 else 32
    return {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 8 if dim == 128 else 4, "num_stages": 2}


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@triton.jit
def row_dots_kernel(out, grad, dots, rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    here = (row < rows)[:, None]
    product = tl.load(out + at, mask=here, other=0.0).to(tl.float32) * tl.load(grad + at, mask=here, other=0.0)
    tl.store(dots + row, tl.sum(product, 1), mask=row < rows)


@triton.jit
def attend(acc, top, total, scores, v):
    """One step of online softmax: scores [M, N] in units of log2 (-inf where hidden), v [N, D]."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(top - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return acc, new_top, total * keep + tl.sum(p, 1)


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
    dims = tl.arange(0, DIM)
    own = (begin + rows) * heads + head
    q = tl.load(query + own[:, None] * DIM + dims[None, :], mask=(rows < length)[:, None], other=0.0)
    kv_head = head // (heads // kv_heads)
    keys = key + (begin * kv_heads + kv_head) * DIM
    values = value + (begin * kv_heads + kv_head) * DIM
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    full = first_row // BLOCK_N * BLOCK_N
    for first in range(0, full, BLOCK_N):  # keys before the block: seen by all of its rows
        column = first + tl.arange(0, BLOCK_N)
        at = column[:, None] * (kv_heads * DIM) + dims[None, :]
        scores = tl.dot(q, tl.trans(tl.load(keys + at)), input_precision="ieee") * scale
        acc, top, total = attend(acc, top, total, scores, tl.load(values + at))
    for first in range(full, tl.minimum(first_row + BLOCK_M, length), BLOCK_N):  # the diagonal
        column = first + tl.arange(0, BLOCK_N)
        at = column[:, None] * (kv_heads * DIM) + dims[None, :]
        here = (column < length)[:, None]
        scores = tl.dot(q, tl.trans(tl.load(keys + at, mask=here, other=0.0)), input_precision="ieee") * scale
        scores = tl.where(column[None, :] <= rows[:, None], scores, -float("inf"))
        acc, top, total = attend(acc, top, total, scores, tl.load(values + at, mask=here, other=0.0))
    tl.store(out + own[:, None] * DIM + dims[None, :], acc / total[:, None], mask=(rows < length)[:, None])
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
    dims = tl.arange(0, DIM)
    own = (begin + rows) * heads + head
    inside = rows < length
    q = tl.load(query + own[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
    g = tl.load(grad + own[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
    row_lse = tl.load(lse + own, mask=inside, other=0.0)
    row_delta = tl.load(delta + own, mask=inside, other=0.0)
    kv_head = head // (heads // kv_heads)
    keys = key + (begin * kv_heads + kv_head) * DIM
    values = value + (begin * kv_heads + kv_head) * DIM
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    for first in range(0, tl.minimum(first_row + BLOCK_M, length), BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        at = column[:, None] * (kv_heads * DIM) + dims[None, :]
        here = (column < length)[:, None]
        k = tl.load(keys + at, mask=here, other=0.0)
        v = tl.load(values + at, mask=here, other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - row_lse[:, None])
        p = tl.where(column[None, :] <= rows[:, None], p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - row_delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    tl.store(dq + own[:, None] * DIM + dims[None, :], acc * scale, mask=inside[:, None])


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
    dims = tl.arange(0, DIM)
    own = ((begin + column) * kv_heads + kv_head)[:, None] * DIM + dims[None, :]
    here = (column < length)[:, None]
    k = tl.load(key + own, mask=here, other=0.0)
    v = tl.load(value + own, mask=here, other=0.0)
    dk_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    repeat = heads // kv_heads
    for head in range(kv_head * repeat, (kv_head + 1) * repeat):
        for first in range(first_key // BLOCK_M * BLOCK_M, length, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < length
            at = (begin + rows) * heads + head
            q = tl.load(query + at[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
            g = tl.load(grad + at[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
            row_lse = tl.load(lse + at, mask=inside, other=float("inf"))
            row_delta = tl.load(delta + at, mask=inside, other=0.0)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - row_lse[None, :])  # [N, M]
            p = tl.where(column[:, None] <= rows[None, :], p, 0.0)
            dv_acc = tl.dot(p.to(g.dtype), g, dv_acc, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - row_delta[None, :])
            dk_acc = tl.dot(ds.to(q.dtype), q, dk_acc, input_precision="ieee")
    tl.store(dk + own, dk_acc * scale, mask=here)
    tl.store(dv + own, dv_acc, mask=here)
