"""Attention of answers over their shared prompt and their own tokens: the second half of group attention.

B prompts, of which prompt b has G_b answers; an answer adds n tokens to the m - n that it had. Token t (0..n-1) of an
answer sees the whole prompt and its own tokens 0..m-n+t. All G_b * n * rep queries of a group and kv head
(rep = H / Hk) form one matrix Q [M, D], so that the prompt's keys and values are read once a group, not once an answer:

    over the prompt, in S splits of its keys for occupancy:  o_s, lse_s = softmax-attention of Q over split s
    over own tokens, m of them, elementwise:                 s_j = scale q . k_j
    merged in a fixed order:  lse = log(sum_s exp(lse_s) + sum_j exp(s_j)),  o = sum_s e^(lse_s - lse) o_s + sum_j ...

The gradient has the form of prompt_attention.py with p = exp(s - lse) over both parts: a program owns a block of prompt
keys, gathers dk and dv over all M queries and leaves its share of dq, which the kernel of the own part sums in the
order of blocks. Nothing is added atomically: runs are bit-equal. With n = 1 this is the decode step; with m = 0 it is
the attention of a prompt's last token, which sees all of its prompt. The kernels are in answer_kernels.py.

FLOPs, A answers in all of prompts of length P: forward 4 A H n P D, backward 10 A H n P D. Bytes: forward the prompt's
keys and values once, 2 B P Hk D elements, where all queries of a kv head fit a tile of 128 (more tiles find them in
L2), q and o, and 4 (D + 1) bytes a query head and split for the partial results, written and read; backward twice the
keys and values, read and written, and 4 D bytes a query head and key block for dq. Up to about 300 queries a kv head
(bf16, H100) memory bounds it.
"""

import torch
import triton
from negfast.kernels.answer_kernels import (
    answer_backward_own_kernel,
    answer_backward_prompt_kernel,
    answer_merge_kernel,
    answer_prompt_kernel,
)
from negfast.kernels.attention_tiles import LOG2E, check_heads, row_dots
from negfast.kernels.dispatch import capability, check_tensors, runs_triton
from torch import Tensor


def answer_attention_reference(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    cu_seqlens: Tensor,
    answer_offsets: Tensor,
    scale: float,
) -> Tensor:
    """Eager and differentiable, a prompt at a time; shapes as in ``answer_attention``."""
    new, heads = query.shape[1:3]
    seen, kv_heads = own_key.shape[1:3]
    repeat = heads // kv_heads
    future = torch.arange(seen, device=query.device) > seen - new + torch.arange(new, device=query.device)[:, None]
    lengths, groups = cu_seqlens.diff().tolist(), answer_offsets.diff().tolist()
    prompts = zip(prompt_key.split(lengths), prompt_value.split(lengths), strict=True)
    answers = zip(query.split(groups), own_key.split(groups), own_value.split(groups), strict=True)
    outputs = []
    for prompt, (q, *own) in zip(prompts, answers, strict=True):
        k, v = (torch.cat([p.expand(len(q), -1, -1, -1), o], 1) for p, o in zip(prompt, own, strict=True))
        k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))  # [G, P + m, H, D]
        scores = torch.einsum("gihd,gjhd->ghij", q, k) * scale
        hidden = torch.cat([future.new_zeros(new, len(prompt[0])), future], 1)
        dtype = torch.promote_types(q.dtype, torch.float32)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=dtype).to(q.dtype)
        outputs.append(torch.einsum("ghij,gjhd->gihd", weights, v))
    return torch.cat(outputs)


def answer_attention(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    cu_seqlens: Tensor,
    answer_offsets: Tensor,
    longest: int,
    most: int,
    scale: float | None = None,
) -> Tensor:
    """Attention of the new tokens of A answers of B prompts.

    query [A, n, H, D], the answers of each prompt side by side, those of prompt b at answer_offsets[b : b + 2], int32
    [B + 1] from 0 to A; prompt_key and prompt_value [T, Hk, D], the packed prompts with offsets cu_seqlens int32
    [B + 1]; own_key and own_value [A, m, Hk, D], earlier tokens first and the n new ones last, or m = 0: the prompt
    alone is seen; longest >= the length of every prompt, most >= its number of answers; scale defaults to D ** -0.5.
    bfloat16, float16 or float32; D in 32, 64, 128.
    Returns [A, n, H, D], differentiable. Raises ValueError on other shapes, dtypes and devices. On the CPU the
    reference computes, in any dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = (query, prompt_key, prompt_value, own_key, own_value)
    if not runs_triton(query.device):
        return answer_attention_reference(*tensors, cu_seqlens, answer_offsets, scale)
    check_heads(query, own_key)
    answers, new, _, dim = query.shape
    seen, kv_heads = own_key.shape[1:3]
    if 0 < seen < new:
        raise ValueError(f"own_key: found {seen} tokens an answer, expected none or at least the {new} of query")
    prompt_shape, own_shape = (prompt_key.shape[0], kv_heads, dim), (answers, seen, kv_heads, dim)
    expected = {
        "prompt_key": (prompt_key, prompt_shape, query.dtype),
        "prompt_value": (prompt_value, prompt_shape, query.dtype),
        "own_key": (own_key, own_shape, query.dtype),
        "own_value": (own_value, own_shape, query.dtype),
        "cu_seqlens": (cu_seqlens, tuple(cu_seqlens.shape), torch.int32),
        "answer_offsets": (answer_offsets, tuple(cu_seqlens.shape), torch.int32),
    }
    check_tensors(expected, query.device)
    if not query.numel():
        return query
    out, _ = _forward(*(x.contiguous() for x in tensors), cu_seqlens, answer_offsets, longest, most, scale)
    return out


@torch.library.custom_op("negfast::answer_attention", mutates_args=())
def _forward(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    cu_seqlens: Tensor,
    answer_offsets: Tensor,
    longest: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [A, n, H, D], lse float32 [A, n, H] in units of log2)"""
    new, heads, dim = query.shape[1:]
    seen, kv_heads = own_key.shape[1:3]
    prompts, queries = len(cu_seqlens) - 1, most * new * heads // kv_heads
    blocks = forward_blocks(queries, dim, query.dtype, capability(query.device))
    tiles = triton.cdiv(queries, blocks["BLOCK_M"])
    splits = split_count(prompts * kv_heads * tiles, triton.cdiv(longest, blocks["BLOCK_N"]), query.device)
    partial = query.new_empty((splits, *query.shape), dtype=torch.float32)
    partial_lse = query.new_empty((splits, *query.shape[:-1]), dtype=torch.float32)
    offsets, rows = (cu_seqlens, answer_offsets), query.numel() // dim
    answer_prompt_kernel[(tiles * splits, kv_heads, prompts)](
        query, prompt_key, prompt_value, partial, partial_lse, *offsets,
        scale * LOG2E, heads, kv_heads, new, splits, rows, DIM=dim, **blocks,
    )  # fmt: skip
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    answer_merge_kernel[(triton.cdiv(queries, 16), kv_heads, prompts)](
        query, own_key, own_value, partial, partial_lse, out, lse, answer_offsets,
        scale * LOG2E, heads, kv_heads, new, seen, splits, rows, DIM=dim, BLOCK_M=16, num_warps=4,
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
    answer_offsets: Tensor,
    longest: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, d prompt_key, d prompt_value, d own_key, d own_value)"""
    new, heads, dim = query.shape[1:]
    seen, kv_heads = own_key.shape[1:3]
    prompts, rows = len(cu_seqlens) - 1, query.numel() // dim
    delta = row_dots(out, grad)
    blocks = backward_blocks(most * new * heads // kv_heads, dim, query.dtype, capability(query.device))
    key_blocks = triton.cdiv(longest, blocks["BLOCK_N"])
    dq_shares = query.new_empty((key_blocks, *query.shape), dtype=torch.float32)
    dk, dv = torch.empty_like(prompt_key), torch.empty_like(prompt_value)
    answer_backward_prompt_kernel[(key_blocks, kv_heads, prompts)](
        query, prompt_key, prompt_value, grad, lse, delta, dq_shares, dk, dv, cu_seqlens, answer_offsets,
        scale, scale * LOG2E, heads, kv_heads, new, rows, DIM=dim, **blocks,
    )  # fmt: skip
    dq, own_dk, own_dv = torch.empty_like(query), torch.empty_like(own_key), torch.empty_like(own_value)
    answer_backward_own_kernel[(triton.cdiv(most, 16), kv_heads, prompts)](
        query, own_key, own_value, grad, lse, delta, dq_shares, dq, own_dk, own_dv, cu_seqlens, answer_offsets,
        scale, scale * LOG2E, heads, kv_heads, new, seen, rows,
        DIM=dim, BLOCK_A=16, BLOCK_N=blocks["BLOCK_N"], num_warps=4, maxnreg=255,
    )  # fmt: skip
    return dq, dk, dv, own_dk, own_dv


@_backward.register_fake
def _(grad, query, prompt_key, prompt_value, own_key, own_value, *_):
    return tuple(torch.empty_like(x) for x in (query, prompt_key, prompt_value, own_key, own_value))


def _save(ctx, inputs, output) -> None:
    *tensors, cu_seqlens, answer_offsets, ctx.longest, ctx.most, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens, answer_offsets)


def _differentiate(ctx, grad, _):
    gradients = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.most, ctx.scale)
    return (*gradients, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def forward_blocks(queries: int, dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    """A tile holds all queries of a kv head and group, up to 128 where registers allow (tools/compile_kernels.py)."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    most = 128 if target in (90, 100) or dim < 128 else 64
    block = min(max(triton.next_power_of_2(queries), 16), most)
    return {"BLOCK_M": block, "BLOCK_N": 64, "num_warps": 8 if block == most else 4, "num_stages": 3}


def backward_blocks(queries: int, dim: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    """Wide blocks of keys where registers allow, since every block writes a share of dq."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1, "maxnreg": 255}
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
