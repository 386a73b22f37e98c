"""Attention of answers over their shared prompt and their own tokens: the second half of group attention.

B prompts with G answers each; an answer adds n tokens to the m - n that it had. Token t (0..n-1) of an answer sees the
whole prompt and its own tokens 0..m-n+t. All G * n * rep queries of a group and kv head (rep = H / Hk) form one matrix
Q [M, D], so that the prompt's keys and values are read once a group, not once an answer:

    over the prompt, in S splits of its keys for occupancy:  o_s, lse_s = softmax-attention of Q over split s
    over own tokens, m of them, elementwise:                 s_j = scale q . k_j
    merged in a fixed order:  lse = log(sum_s exp(lse_s) + sum_j exp(s_j)),  o = sum_s e^(lse_s - lse) o_s + sum_j ...

The gradient has the form of prompt_attention.py with p = exp(s - lse) over both parts: a program owns a block of prompt
keys, gathers dk and dv over all M queries and leaves its share of dq, which the kernel of the own part sums in the
order of blocks. Nothing is added atomically: runs are bit-equal. With n = 1 this is the decode step.

FLOPs: forward 4 B H G n P D, backward 10 B H G n P D. Bytes: forward the prompt's keys and values once, 2 B P Hk D
elements, where all queries of a kv head fit a tile of 128 (more tiles find them in L2), q and o, and 4 (D + 1) bytes a
query head and split for the partial results, written and read; backward twice the keys and values, read and written,
and 4 D bytes a query head and key block for dq. Up to about 300 queries a kv head (bf16, H100) memory bounds it.
"""

import torch
import triton
import triton.language as tl
from negfast.kernels.dispatch import capability, check_tensors, runs_triton
from negfast.kernels.prompt_attention import LOG2E, attend, check_heads, row_dots
from torch import Tensor


def answer_attention_reference(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> Tensor:
    """Eager and differentiable, a prompt at a time; shapes as in ``answer_attention``."""
    group, new, heads = query.shape[1:4]
    seen, kv_heads = own_key.shape[2], own_key.shape[3]
    repeat = heads // kv_heads
    future = torch.arange(seen, device=query.device) > seen - new + torch.arange(new, device=query.device)[:, None]
    outputs = []
    for b, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        prompt = (x[begin:end].expand(group, -1, -1, -1) for x in (prompt_key, prompt_value))
        k, v = (torch.cat([p, own[b]], 1) for p, own in zip(prompt, (own_key, own_value), strict=True))
        k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))  # [G, P + m, H, D]
        scores = torch.einsum("gihd,gjhd->ghij", query[b], k) * scale
        hidden = torch.cat([future.new_zeros(new, end - begin), future], 1)
        dtype = torch.promote_types(query.dtype, torch.float32)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=dtype).to(query.dtype)
        outputs.append(torch.einsum("ghij,gjhd->gihd", weights, v))
    return torch.stack(outputs)


def answer_attention(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None = None,
) -> Tensor:
    """Attention of the new tokens of B x G answers.

    query [B, G, n, H, D]; prompt_key and prompt_value [T, Hk, D], the packed prompts with offsets cu_seqlens
    int32 [B + 1]; own_key and own_value [B, G, m, Hk, D], earlier tokens first and the n new ones last;
    longest >= the length of every prompt; scale defaults to D ** -0.5. bfloat16, float16 or float32; D in 32, 64, 128.
    Returns [B, G, n, H, D], differentiable. Raises ValueError on other shapes, dtypes and devices. On the CPU the
    reference computes, in any dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = (query, prompt_key, prompt_value, own_key, own_value)
    if not runs_triton(query.device):
        return answer_attention_reference(*tensors, cu_seqlens, scale)
    check_heads(query, own_key)
    prompts, group, new, _, dim = query.shape
    seen, kv_heads = own_key.shape[2:4]
    if not 1 <= new <= seen:
        raise ValueError(f"own_key: found {seen} tokens an answer, expected at least the {new} of query")
    prompt_shape = (prompt_key.shape[0], kv_heads, dim)
    own_shape = (prompts, group, seen, kv_heads, dim)
    expected = {
        "prompt_key": (prompt_key, prompt_shape, query.dtype),
        "prompt_value": (prompt_value, prompt_shape, query.dtype),
        "own_key": (own_key, own_shape, query.dtype),
        "own_value": (own_value, own_shape, query.dtype),
        "cu_seqlens": (cu_seqlens, (prompts + 1,), torch.int32),
    }
    check_tensors(expected, query.device)
    out, _ = _forward(*(x.contiguous() for x in tensors), cu_seqlens, longest, scale)
    return out


@torch.library.custom_op("negfast::answer_attention", mutates_args=())
def _forward(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, G, n, H, D], lse float32 [B, G, n, H] in units of log2)"""
    prompts, group, new, heads, dim = query.shape
    seen, kv_heads = own_key.shape[2:4]
    queries = group * new * heads // kv_heads
    blocks = forward_blocks(queries, dim, query.dtype, capability(query.device))
    tiles = triton.cdiv(queries, blocks["BLOCK_M"])
    splits = split_count(prompts * kv_heads * tiles, triton.cdiv(longest, blocks["BLOCK_N"]), query.device)
    partial = query.new_empty((splits, *query.shape), dtype=torch.float32)
    partial_lse = query.new_empty((splits, *query.shape[:-1]), dtype=torch.float32)
    answer_prompt_kernel[(tiles * splits, kv_heads, prompts)](
        query, prompt_key, prompt_value, partial, partial_lse, cu_seqlens,
        scale * LOG2E, heads, kv_heads, group * new, splits, DIM=dim, **blocks,
    )  # fmt: skip
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    answer_merge_kernel[(triton.cdiv(queries, 16), kv_heads, prompts)](
        query, own_key, own_value, partial, partial_lse, out, lse,
        scale * LOG2E, heads, kv_heads, group, new, seen, splits, DIM=dim, BLOCK_M=16, num_warps=4,
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(query, *_):
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("negfast::answer_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, d prompt_key, d prompt_value, d own_key, d own_value)"""
    prompts, group, new, heads, dim = query.shape
    seen, kv_heads = own_key.shape[2:4]
    delta = row_dots(out, grad)
    blocks = backward_blocks(group * new * heads // kv_heads, dim, query.dtype, capability(query.device))
    key_blocks = triton.cdiv(longest, blocks["BLOCK_N"])
    dq_shares = query.new_empty((key_blocks, *query.shape), dtype=torch.float32)
    dk, dv = torch.empty_like(prompt_key), torch.empty_like(prompt_value)
    answer_backward_prompt_kernel[(key_blocks, kv_heads, prompts)](
        query, prompt_key, prompt_value, grad, lse, delta, dq_shares, dk, dv, cu_seqlens,
        scale, scale * LOG2E, heads, kv_heads, group * new, DIM=dim, **blocks,
    )  # fmt: skip
    dq, own_dk, own_dv = torch.empty_like(query), torch.empty_like(own_key), torch.empty_like(own_value)
    answer_backward_own_kernel[(triton.cdiv(group, 16), kv_heads, prompts)](
        query, own_key, own_value, grad, lse, delta, dq_shares, dq, own_dk, own_dv, cu_seqlens,
        scale, scale * LOG2E, heads, kv_heads, group, new, seen,
        DIM=dim, BLOCK_A=16, BLOCK_N=blocks["BLOCK_N"], num_warps=4, maxnreg=255,
    )  # fmt: skip
    return dq, dk, dv, own_dk, own_dv


@_backward.register_fake
def _(grad, query, prompt_key, prompt_value, own_key, own_value, *_):
    return tuple(torch.empty_like(x) for x in (query, prompt_key, prompt_value, own_key, own_value))


def _save(ctx, inputs, output) -> None:
    *tensors, cu_seqlens, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens)


def _differentiate(ctx, grad, _):
    gradients = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scale)
    return (*gradients, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def forward_blocks(queries: int, dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    """A tile holds all queries of a kv head and group, up to 128 where registers allow (tools/compile_kernels.py)."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    most = 128 if target in (90, 100) or dim < 128 else 64
    block = min(max(triton.next_power_of_2(queries), 16), most)
    return {"BLOCK_M": block, "BLOCK_N": 64, "num_warps": 8 if block == 128 else 4, "num_stages": 3}


def backward_blocks(queries: int, dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    """Wide blocks of keys where registers allow, since every block writes a share of dq."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    rows = max(triton.next_power_of_2(queries), 16)
    if target in (90, 100):
        return {"BLOCK_M": min(rows, 64 if dim < 128 else 32), "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": min(rows, 32), "BLOCK_N": 64, "num_warps": 8 if dim == 128 else 4, "num_stages": 2}


def split_count(programs: int, key_blocks: int, device: torch.device) -> int:
    """The fewest splits of a prompt's keys that keep nine in ten multiprocessors at work, of two key blocks or more.

    Few, since partial results are written and read again; a multiprocessor's loads in flight fill its share of memory.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132

    def at_work(splits: int) -> float:
        return programs * splits / (triton.cdiv(programs * splits, processors) * processors)

    choices = range(1, max(1, min(key_blocks // 2, 16)) + 1)
    return next((splits for splits in choices if at_work(splits) >= 0.9), max(choices, key=at_work))


@triton.jit
def answer_prompt_kernel(
    query,
    key,
    value,
    partial,
    partial_lse,
    cu_seqlens,
    scale,
    heads,
    kv_heads,
    tokens,
    splits,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Softmax attention of one tile of queries over one split of the prompt; ``tokens`` = G * n."""
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    kv_head = tl.program_id(1)
    prompt = tl.program_id(2)
    begin = tl.load(cu_seqlens + prompt)
    length = tl.load(cu_seqlens + prompt + 1) - begin
    begin = begin.to(tl.int64)
    repeat = heads // kv_heads
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens * repeat
    dims = tl.arange(0, DIM)
    own = (prompt.to(tl.int64) * tokens + rows // repeat) * heads + kv_head * repeat + rows % repeat
    q = tl.load(query + own[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
    keys = key + (begin * kv_heads + kv_head) * DIM
    values = value + (begin * kv_heads + kv_head) * DIM
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    for first in range(split * share, tl.minimum((split + 1) * share, length), BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        at = column[:, None] * (kv_heads * DIM) + dims[None, :]
        here = (column < length)[:, None]
        scores = tl.dot(q, tl.trans(tl.load(keys + at, mask=here, other=0.0)), input_precision="ieee") * scale
        scores = tl.where((column < length)[None, :], scores, -float("inf"))
        acc, top, total = attend(acc, top, total, scores, tl.load(values + at, mask=here, other=0.0))
    empty = total == 0  # a split beyond the end of a short prompt
    total = tl.where(empty, 1.0, total)
    skip = split.to(tl.int64) * tl.num_programs(2) * tokens * heads
    tl.store(partial + (skip + own)[:, None] * DIM + dims[None, :], acc / total[:, None], mask=inside[:, None])
    tl.store(partial_lse + skip + own, tl.where(empty, -float("inf"), top + tl.log2(total)), mask=inside)


@triton.jit
def answer_merge_kernel(
    query,
    own_key,
    own_value,
    partial,
    partial_lse,
    out,
    lse,
    scale,
    heads,
    kv_heads,
    group,
    new,
    seen,
    splits,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Own tokens first (every query sees at least itself), then the splits in their order."""
    kv_head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    repeat = heads // kv_heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < group * new * repeat
    dims = tl.arange(0, DIM)
    own = (prompt * group * new + rows // repeat) * heads + kv_head * repeat + rows % repeat
    q = tl.load(query + own[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    answer = prompt * group + rows // (repeat * new)
    visible = seen - new + rows // repeat % new  # own tokens up to and with this one
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    for j in range(0, seen):
        at = ((answer * seen + j) * kv_heads + kv_head)[:, None] * DIM + dims[None, :]
        k = tl.load(own_key + at, mask=inside[:, None], other=0.0).to(tl.float32)
        v = tl.load(own_value + at, mask=inside[:, None], other=0.0).to(tl.float32)
        score = tl.where(j <= visible, tl.sum(q * k, 1) * scale, -float("inf"))
        new_top = tl.maximum(top, score)  # finite from j = 0 on
        keep, p = tl.exp2(top - new_top), tl.exp2(score - new_top)
        acc = acc * keep[:, None] + p[:, None] * v
        total = total * keep + p
        top = new_top
    for split in range(0, splits):
        at = split * tl.num_programs(2).to(tl.int64) * group * new * heads + own
        score = tl.load(partial_lse + at, mask=inside, other=-float("inf"))
        part = tl.load(partial + at[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
        new_top = tl.maximum(top, score)
        keep, p = tl.exp2(top - new_top), tl.exp2(score - new_top)
        acc = acc * keep[:, None] + p[:, None] * part
        total = total * keep + p
        top = new_top
    tl.store(out + own[:, None] * DIM + dims[None, :], acc / total[:, None], mask=inside[:, None])
    tl.store(lse + own, top + tl.log2(total), mask=inside)


@triton.jit
def answer_backward_prompt_kernel(
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
    scale,
    scale_log2,
    heads,
    kv_heads,
    tokens,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one block of prompt keys over all queries of its kv head, and the block's share of their dq."""
    first_key = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    prompt = tl.program_id(2)
    begin = tl.load(cu_seqlens + prompt)
    length = tl.load(cu_seqlens + prompt + 1) - begin
    if first_key >= length:
        return
    column = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, DIM)
    own = ((begin.to(tl.int64) + column) * kv_heads + kv_head)[:, None] * DIM + dims[None, :]
    here = (column < length)[:, None]
    k = tl.load(key + own, mask=here, other=0.0)
    v = tl.load(value + own, mask=here, other=0.0)
    dk_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    repeat = heads // kv_heads
    skip = tl.program_id(0).to(tl.int64) * tl.num_programs(2) * tokens * heads
    for first in range(0, tokens * repeat, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        inside = rows < tokens * repeat
        at = (prompt.to(tl.int64) * tokens + rows // repeat) * heads + kv_head * repeat + rows % repeat
        q = tl.load(query + at[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
        g = tl.load(grad + at[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
        row_lse = tl.load(lse + at, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + at, mask=inside, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - row_lse[None, :])  # [N, M]
        p = tl.where(here, p, 0.0)
        dv_acc = tl.dot(p.to(g.dtype), g, dv_acc, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - row_delta[None, :])
        ds = ds.to(q.dtype)
        dk_acc = tl.dot(ds, q, dk_acc, input_precision="ieee")
        dq_share = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale
        tl.store(dq_shares + (skip + at)[:, None] * DIM + dims[None, :], dq_share, mask=inside[:, None])
    tl.store(dk + own, dk_acc * scale, mask=here)
    tl.store(dv + own, dv_acc, mask=here)


@triton.jit
def answer_backward_own_kernel(
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
    cu_seqlens,
    scale,
    scale_log2,
    heads,
    kv_heads,
    group,
    new,
    seen,
    DIM: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For a block of answers: dq of their queries (shares of the prompt's blocks, then own tokens); own dk and dv.

    Query q = step * rep + r of an answer; there are few, so each loop runs over all answers of the block at once.
    """
    kv_head = tl.program_id(1)
    prompt = tl.program_id(2)
    length = tl.load(cu_seqlens + prompt + 1) - tl.load(cu_seqlens + prompt)
    repeat = heads // kv_heads
    member = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    inside = (member < group)[:, None]
    answer = prompt.to(tl.int64) * group + member
    dims = tl.arange(0, DIM)[None, :]
    stride = tl.num_programs(2).to(tl.int64) * group * new * heads
    for q_index in range(0, new * repeat):
        at = (answer * new + q_index // repeat) * heads + kv_head * repeat + q_index % repeat
        wide = at[:, None] * DIM + dims
        q = tl.load(query + wide, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + wide, mask=inside, other=0.0).to(tl.float32)
        row_lse = tl.load(lse + at, mask=member < group, other=0.0)
        row_delta = tl.load(delta + at, mask=member < group, other=0.0)
        acc = tl.zeros((BLOCK_A, DIM), tl.float32)
        for block in range(0, tl.cdiv(length, BLOCK_N)):
            acc += tl.load(dq_shares + block * stride * DIM + wide, mask=inside, other=0.0)
        for j in range(0, seen - new + q_index // repeat + 1):
            own = ((answer * seen + j) * kv_heads + kv_head)[:, None] * DIM + dims
            k = tl.load(own_key + own, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(own_value + own, mask=inside, other=0.0).to(tl.float32)
            p = tl.exp2(tl.sum(q * k, 1) * scale_log2 - row_lse)
            acc += (scale * p * (tl.sum(g * v, 1) - row_delta))[:, None] * k
        tl.store(dq + wide, acc, mask=inside)
    for j in range(0, seen):
        own = ((answer * seen + j) * kv_heads + kv_head)[:, None] * DIM + dims
        k = tl.load(own_key + own, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(own_value + own, mask=inside, other=0.0).to(tl.float32)
        dk_acc = tl.zeros((BLOCK_A, DIM), tl.float32)
        dv_acc = tl.zeros((BLOCK_A, DIM), tl.float32)
        for q_index in range(tl.maximum(j - (seen - new), 0) * repeat, new * repeat):
            at = (answer * new + q_index // repeat) * heads + kv_head * repeat + q_index % repeat
            wide = at[:, None] * DIM + dims
            q = tl.load(query + wide, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad + wide, mask=inside, other=0.0).to(tl.float32)
            row_lse = tl.load(lse + at, mask=member < group, other=0.0)
            row_delta = tl.load(delta + at, mask=member < group, other=0.0)
            p = tl.exp2(tl.sum(q * k, 1) * scale_log2 - row_lse)
            dv_acc += p[:, None] * g
            dk_acc += (scale * p * (tl.sum(g * v, 1) - row_delta))[:, None] * q
        tl.store(own_dk + own, dk_acc, mask=inside)
        tl.store(own_dv + own, dv_acc, mask=inside)
