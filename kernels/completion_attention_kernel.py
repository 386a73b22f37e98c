"""The four kernels of completion_attention.py, which has their derivation, bytes and FLOPs.

``offsets`` are those of the completions, int32 [B + 1]; ``prefix`` int32 [C] are the prompt tokens that each sees;
``queries`` is C * n * H, the rows of one split or key block. Within a prompt, row r of a kv head is token r // rep of
its completions' n * G_b, and query head r % rep of the kv head's rep.
"""

import triton
import triton.language as tl

from negfast.kernels.attention_kernel import attend, dot, key_gradients, load_rows, merge, store_rows


@triton.jit
def query_rows(rows, completion_begin, new, kv_head, heads, kv_heads):
    """Where rows of a prompt and kv head lie in query [C * n * H, D], int64."""
    repeat = heads // kv_heads
    return (completion_begin.to(tl.int64) * new + rows // repeat) * heads + kv_head * repeat + rows % repeat


@triton.jit
def row_prefixes(prefix, rows, inside, completion_begin, rows_each):
    """Prompt tokens that rows see, 0 outside; ``rows_each``: n * rep, the rows of a completion."""
    return tl.load(prefix + completion_begin + rows // rows_each, mask=inside, other=0)


@triton.jit
def completion_prompt_kernel(
    query,
    key,
    value,
    partial,
    partial_lse,
    cu_seqlens,
    offsets,
    prefix,
    scale,
    heads,
    kv_heads,
    new,
    splits,
    queries,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Softmax attention of one tile of queries over one split of the keys up to the tile's largest prefix."""
    split = tl.program_id(0) % splits
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) // splits * BLOCK_M  # the longest prefixes first
    kv_head = tl.program_id(1)
    prompt = tl.program_id(2)
    completion_begin = tl.load(offsets + prompt)
    rows_each = new * (heads // kv_heads)
    count = (tl.load(offsets + prompt + 1) - completion_begin) * rows_each
    if first_row >= count:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < count
    visible = row_prefixes(prefix, rows, inside, completion_begin, rows_each)
    reach = tl.max(visible, 0)
    at = query_rows(rows, completion_begin, new, kv_head, heads, kv_heads)
    q = load_rows(query, at, inside, DIM)
    first_key = tl.load(cu_seqlens + prompt).to(tl.int64) * kv_heads + kv_head
    keys, values = key + first_key * DIM, value + first_key * DIM
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    share = tl.cdiv(tl.cdiv(reach, BLOCK_N), splits) * BLOCK_N
    for first in range(split * share, tl.minimum((split + 1) * share, reach), BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        here = column < reach
        scores = dot(q, load_rows(keys, column * kv_heads, here, DIM)) * scale
        scores = tl.where(column[None, :] < visible[:, None], scores, -float("inf"))
        acc, top, total = attend(acc, top, total, scores, load_rows(values, column * kv_heads, here, DIM))
    some = split * share < visible  # else the split is beyond the row's prefix: no result, lse -inf
    total = tl.where(some, total, 1.0)
    at += split * queries
    store_rows(partial, at, acc / total[:, None], some, DIM)
    tl.store(partial_lse + at, tl.where(some, top + tl.log2(total), -float("inf")), mask=inside)


@triton.jit
def completion_merge_kernel(
    query,
    own_key,
    own_value,
    partial,
    partial_lse,
    out,
    lse,
    offsets,
    scale,
    heads,
    kv_heads,
    new,
    seen,
    splits,
    queries,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Own tokens first, then in their order the splits that hold keys of a row's prefix."""
    kv_head = tl.program_id(1)
    completion_begin = tl.load(offsets + tl.program_id(2))
    repeat = heads // kv_heads
    count = (tl.load(offsets + tl.program_id(2) + 1) - completion_begin) * new * repeat
    first_row = tl.program_id(0) * BLOCK_M
    if first_row >= count:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < count
    at = query_rows(rows, completion_begin, new, kv_head, heads, kv_heads)
    q = load_rows(query, at, inside, DIM).to(tl.float32)
    first_key = (completion_begin.to(tl.int64) + rows // (repeat * new)) * seen
    visible = seen - new + rows // repeat % new  # own tokens up to and with this one
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    for j in range(0, seen):
        own = (first_key + j) * kv_heads + kv_head
        k = load_rows(own_key, own, inside, DIM).to(tl.float32)
        v = load_rows(own_value, own, inside, DIM).to(tl.float32)
        score = tl.where(j <= visible, tl.sum(q * k, 1) * scale, -float("inf"))
        acc, top, total = merge(acc, top, total, score, v)
    for split in range(0, splits):
        part = split * queries + at
        score = tl.load(partial_lse + part, mask=inside, other=-float("inf"))
        acc, top, total = merge(acc, top, total, score, load_rows(partial, part, score > -float("inf"), DIM))
    store_rows(out, at, acc / total[:, None], inside, DIM)
    tl.store(lse + at, top + tl.log2(total), mask=inside)


@triton.jit
def completion_backward_prompt_kernel(
    query,
    key,
    value,
    grad,
    lse,
    delta,
    dq_shares,
    dk,
    dv,
    cu_seqlens,
    offsets,
    prefix,
    scale,
    scale_log2,
    heads,
    kv_heads,
    new,
    queries,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one block of prompt keys over the queries of its kv head, and the block's share of their dq.

    Completions before the first whose prefix reaches the block are skipped, all others but for their own prefix masked;
    a query of a shorter prefix has no share.
    """
    first_key = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    prompt = tl.program_id(2)
    begin = tl.load(cu_seqlens + prompt)
    length = tl.load(cu_seqlens + prompt + 1) - begin
    if first_key >= length:
        return
    completion_begin = tl.load(offsets + prompt)
    completion_end = tl.load(offsets + prompt + 1)
    first_to_reach = tl.full((128,), completion_end, tl.int32)
    for first in range(completion_begin, completion_end, 128):
        member = first + tl.arange(0, 128)
        reaches = tl.load(prefix + member, mask=member < completion_end, other=0) > first_key
        first_to_reach = tl.minimum(first_to_reach, tl.where(reaches, member, completion_end))
    completion_begin = tl.min(first_to_reach, 0)
    rows_each = new * (heads // kv_heads)
    count = (completion_end - completion_begin) * rows_each
    column = first_key + tl.arange(0, BLOCK_N)
    of_prompt = begin.to(tl.int64) * kv_heads * DIM
    own = column * kv_heads + kv_head
    here = column < length
    k = load_rows(key + of_prompt, own, here, DIM)
    v = load_rows(value + of_prompt, own, here, DIM)
    dk_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    skip = tl.program_id(0) * queries
    for first in range(0, count, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        inside = rows < count
        visible = row_prefixes(prefix, rows, inside, completion_begin, rows_each)
        at = query_rows(rows, completion_begin, new, kv_head, heads, kv_heads)
        q = load_rows(query, at, inside, DIM)
        g = load_rows(grad, at, inside, DIM)
        row_lse = tl.load(lse + at, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + at, mask=inside, other=0.0)
        seen = column[:, None] < visible[None, :]
        dk_acc, dv_acc, ds = key_gradients(dk_acc, dv_acc, k, v, q, g, row_lse, row_delta, seen, scale_log2)
        dq_share = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale
        store_rows(dq_shares, skip + at, dq_share, visible > first_key, DIM)
    store_rows(dk + of_prompt, own, dk_acc * scale, here, DIM)
    store_rows(dv + of_prompt, own, dv_acc, here, DIM)


@triton.jit
def completion_backward_own_kernel(
    query,
    own_key,
    own_value,
    grad,
    lse,
    delta,
    dq_shares,
    dq,
    own_dk,
    own_dv,
    offsets,
    prefix,
    scale,
    scale_log2,
    heads,
    kv_heads,
    new,
    seen,
    queries,
    DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For a block of completions: dq of their queries (shares of key blocks, then own tokens); own dk and dv.

    Query r = step * rep + head of a completion; there are few, so each loop runs over the block's completions at once.
    """
    kv_head = tl.program_id(1)
    prompt = tl.program_id(2)
    completion_begin = tl.load(offsets + prompt)
    group = tl.load(offsets + prompt + 1) - completion_begin
    if tl.program_id(0) * BLOCK_C >= group:
        return
    repeat = heads // kv_heads
    member = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = member < group
    completion = completion_begin.to(tl.int64) + member
    visible = tl.load(prefix + completion, mask=inside, other=0)
    key_blocks = tl.cdiv(tl.max(visible, 0), BLOCK_N)
    for row in range(0, new * repeat):
        at = (completion * new + row // repeat) * heads + kv_head * repeat + row % repeat
        q = load_rows(query, at, inside, DIM).to(tl.float32)
        g = load_rows(grad, at, inside, DIM).to(tl.float32)
        row_lse = tl.load(lse + at, mask=inside, other=0.0)
        row_delta = tl.load(delta + at, mask=inside, other=0.0)
        acc = tl.zeros((BLOCK_C, DIM), tl.float32)
        for block in range(0, key_blocks):
            acc += load_rows(dq_shares, block * queries + at, block * BLOCK_N < visible, DIM)
        for j in range(0, seen - new + row // repeat + 1):
            own = (completion * seen + j) * kv_heads + kv_head
            k = load_rows(own_key, own, inside, DIM).to(tl.float32)
            v = load_rows(own_value, own, inside, DIM).to(tl.float32)
            p = tl.exp2(tl.sum(q * k, 1) * scale_log2 - row_lse)
            acc += (scale * p * (tl.sum(g * v, 1) - row_delta))[:, None] * k
        store_rows(dq, at, acc, inside, DIM)
    for j in range(0, seen):
        own = (completion * seen + j) * kv_heads + kv_head
        k = load_rows(own_key, own, inside, DIM).to(tl.float32)
        v = load_rows(own_value, own, inside, DIM).to(tl.float32)
        dk_acc = tl.zeros((BLOCK_C, DIM), tl.float32)
        dv_acc = tl.zeros((BLOCK_C, DIM), tl.float32)
        for row in range(tl.maximum(j - (seen - new), 0) * repeat, new * repeat):
            at = (completion * new + row // repeat) * heads + kv_head * repeat + row % repeat
            q = load_rows(query, at, inside, DIM).to(tl.float32)
            g = load_rows(grad, at, inside, DIM).to(tl.float32)
            row_lse = tl.load(lse + at, mask=inside, other=0.0)
            row_delta = tl.load(delta + at, mask=inside, other=0.0)
            p = tl.exp2(tl.sum(q * k, 1) * scale_log2 - row_lse)
            dv_acc += p[:, None] * g
            dk_acc += (scale * p * (tl.sum(g * v, 1) - row_delta))[:, None] * q
        store_rows(own_dk, own, dk_acc, inside, DIM)
        store_rows(own_dv, own, dv_acc, inside, DIM)
