"""The three kernels of prompt_attention.py, which has their derivation, bytes and FLOPs."""

import triton
import triton.language as tl

from negfast.kernels.attention_kernel import attend, dot, key_gradients, load_rows, store_rows


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
    own = column * kv_heads + kv_head
    here = column < length
    of_prompt = begin * kv_heads * DIM
    k = load_rows(key + of_prompt, own, here, DIM)
    v = load_rows(value + of_prompt, own, here, DIM)
    dk_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    repeat = heads // kv_heads
    queries, grads = query + begin * heads * DIM, grad + begin * heads * DIM
    lses, deltas = lse + begin * heads, delta + begin * heads
    for head in range(kv_head * repeat, (kv_head + 1) * repeat):
        for first in range(first_key // BLOCK_M * BLOCK_M, length, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < length
            at = rows * heads + head
            q = load_rows(queries, at, inside, DIM)
            g = load_rows(grads, at, inside, DIM)
            row_lse = tl.load(lses + at, mask=inside, other=float("inf"))
            row_delta = tl.load(deltas + at, mask=inside, other=0.0)
            visible = column[:, None] <= rows[None, :]
            dk_acc, dv_acc, _ = key_gradients(dk_acc, dv_acc, k, v, q, g, row_lse, row_delta, visible, scale_log2)
    store_rows(dk + of_prompt, own, dk_acc * scale, here, DIM)
    store_rows(dv + of_prompt, own, dv_acc, here, DIM)
