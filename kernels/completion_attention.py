"""Attention of completions over a prefix of their prompt and their own tokens: the second half of group attention.

B prompts, of which prompt b has G_b completions; a completion adds n tokens to the m - n that it had. Token t (0..n-1)
of completion c sees the first P_c tokens of its prompt, its prefix, and its own tokens 0..m-n+t. All G_b * n * rep
queries of a group and kv head (rep = H / Hk) form one matrix Q [M, D], cut into tiles of rows. A tile reads the
prompt's keys and values once, up to the largest prefix of its rows; a row is masked beyond its own:

    over the prefix, in S splits of the tile's keys for occupancy:  o_s, lse_s = softmax-attention of Q over split s
    over own tokens, m of them, elementwise:                        s_j = scale q . k_j
    merged in a fixed order:  lse = log(sum_s exp(lse_s) + sum_j exp(s_j)),  o = sum_s e^(lse_s - lse) o_s + sum_j ...

The gradient has the form of prompt_attention.py with p = exp(s - lse) over both parts: a program owns a block of prompt
keys, gathers dk and dv over the rows from the first whose prefix reaches the block, and leaves its share of their dq,
which the kernel of the own part sums in the order of blocks. Nothing is added atomically: runs are bit-equal. delta is
of the output as rounded: where one token has nearly all weight, gradients of scores are small and carry its rounding.
With n = 1 this is the decode step. The kernels are in completion_attention_kernel.py.

Completions of a prompt should stand in ascending order of prefix, so that a tile's rows have similar ones; any order is
right. In t tiles of rows whose prefixes are spread evenly over the prompt, the forward computes (t + 1) / (2 t) of what
full prompts take, up to whole blocks of keys.

FLOPs: forward 4 n H D sum_c P_c, backward 10 n H D sum_c P_c. Bytes: forward the keys and values up to a group's
largest prefix once, 2 P Hk D elements a prompt, where all queries of a kv head fit a tile of 128 (more tiles find them
in L2), q and o, and 4 (D + 1) bytes a query head and split that holds keys of its prefix, written and read; backward
twice the keys and values, read and written, and 4 D bytes for dq a query head and key block below its prefix, written
and read. Up to about 300 queries a kv head (bf16, H100) memory bounds it.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from negfast.kernels.attention_inputs import Segments, check_heads
from negfast.kernels.attention_kernel import LOG2E, row_dots
from negfast.kernels.completion_attention_kernel import (
    completion_backward_own_kernel,
    completion_backward_prompt_kernel,
    completion_merge_kernel,
    completion_prompt_kernel,
)
from negfast.kernels.completion_attention_reference import completion_attention_reference
from negfast.kernels.dispatch import capability, check_tensors, processors, runs_triton
from negfast.kernels.operators import operator


def completion_attention(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    prompts: Segments,
    completions: Segments,
    prefix: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Attention of the new tokens of C completions of B prompts.

    query [C, n, H, D]; prompt_key and prompt_value [T, Hk, D], the packed prompts; own_key and own_value
    [C, m, Hk, D], earlier tokens first and the n new ones last; prompts: segments of the T tokens; completions:
    segments of the C completions, those of a prompt side by side; prefix int32 [C]: how many tokens of its prompt a
    completion sees, from 0 to all (not checked, which would wait for the device), fastest in ascending order within a
    prompt; scale defaults to D ** -0.5. bfloat16, float16 or float32; D in 32, 64, 128.
    Returns [C, n, H, D], differentiable. Raises ValueError on other shapes, dtypes and devices. On the CPU the
    reference computes, in any dtype.
    """
    tensors = (query, prompt_key, prompt_value, own_key, own_value)
    if not runs_triton(query.device, "attention"):
        return completion_attention_reference(*tensors, prompts, completions, prefix, scale)
    check_heads(query, own_key)
    count, new, _, dim = query.shape
    seen, kv_heads = own_key.shape[1:3]
    if seen < new:
        raise ValueError(f"own_key: found {seen} tokens a completion, expected at least the {new} of query")
    prompt_shape, own_shape = (prompt_key.shape[0], kv_heads, dim), (count, seen, kv_heads, dim)
    expected = {
        "prompt_key": (prompt_key, prompt_shape, query.dtype),
        "prompt_value": (prompt_value, prompt_shape, query.dtype),
        "own_key": (own_key, own_shape, query.dtype),
        "own_value": (own_value, own_shape, query.dtype),
        "prompts.offsets": (prompts.offsets, (prompts.count + 1,), torch.int32),
        "completions.offsets": (completions.offsets, (prompts.count + 1,), torch.int32),
        "prefix": (prefix, (count,), torch.int32),
    }
    check_tensors(expected, query.device)
    if not query.numel():
        return query
    scale = dim**-0.5 if scale is None else scale
    contiguous = (x.contiguous() for x in (*tensors, prefix))
    return CompletionAttention.apply(*contiguous, prompts, completions, scale)


class CompletionAttention(torch.autograd.Function):
    """The output for query, keys and values; the backward rebuilds the weights from lse."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, prefix, prompts, completions, scale = inputs
        ctx.sizes = prompts.longest, completions.longest, scale
        rows = prompts.offsets, completions.offsets, prefix
        out, lse = _forward(*tensors, *rows, *ctx.sizes)
        ctx.save_for_backward(*tensors, out, lse, *rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.sizes), None, None, None, None


def launch_forward(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    prompt_offsets: Tensor,
    completion_offsets: Tensor,
    prefix: Tensor,
    longest: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [C, n, H, D], lse float32 [C, n, H] in units of log2); ``most`` completions a prompt"""
    new, heads, dim = query.shape[1:]
    seen, kv_heads = own_key.shape[1:3]
    prompts, queries = len(prompt_offsets) - 1, most * new * heads // kv_heads
    blocks = forward_blocks(queries, dim, query.dtype, capability(query.device))
    tiles = triton.cdiv(queries, blocks["BLOCK_M"])
    splits = split_count(prompts * kv_heads * tiles, triton.cdiv(longest, blocks["BLOCK_N"]), query.device)
    partial = query.new_empty((splits, *query.shape), dtype=torch.float32)
    partial_lse = query.new_empty((splits, *query.shape[:-1]), dtype=torch.float32)
    rows = query.numel() // dim
    completion_prompt_kernel[(tiles * splits, kv_heads, prompts)](
        query, prompt_key, prompt_value, partial, partial_lse, prompt_offsets, completion_offsets, prefix,
        scale * LOG2E, heads, kv_heads, new, splits, rows, DIM=dim, **blocks,
    )  # fmt: skip
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    completion_merge_kernel[(triton.cdiv(queries, 16), kv_heads, prompts)](
        query, own_key, own_value, partial, partial_lse, out, lse, completion_offsets,
        scale * LOG2E, heads, kv_heads, new, seen, splits, rows, DIM=dim, BLOCK_M=16, num_warps=4,
    )  # fmt: skip
    return out, lse


def launch_backward(
    grad: Tensor,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    out: Tensor,
    lse: Tensor,
    prompt_offsets: Tensor,
    completion_offsets: Tensor,
    prefix: Tensor,
    longest: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, d prompt_key, d prompt_value, d own_key, d own_value)"""
    new, heads, dim = query.shape[1:]
    seen, kv_heads = own_key.shape[1:3]
    prompts, rows = len(prompt_offsets) - 1, query.numel() // dim
    delta = row_dots(out, grad)
    blocks = backward_blocks(most * new * heads // kv_heads, dim, query.dtype, capability(query.device))
    key_blocks = triton.cdiv(longest, blocks["BLOCK_N"])
    dq_shares = query.new_empty((key_blocks, *query.shape), dtype=torch.float32)
    dk, dv = torch.empty_like(prompt_key), torch.empty_like(prompt_value)
    completion_backward_prompt_kernel[(key_blocks, kv_heads, prompts)](
        query, prompt_key, prompt_value, grad, lse, delta, dq_shares, dk, dv, prompt_offsets, completion_offsets,
        prefix, scale, scale * LOG2E, heads, kv_heads, new, rows, DIM=dim, **blocks,
    )  # fmt: skip
    dq, own_dk, own_dv = torch.empty_like(query), torch.empty_like(own_key), torch.empty_like(own_value)
    completion_backward_own_kernel[(triton.cdiv(most, 16), kv_heads, prompts)](
        query, own_key, own_value, grad, lse, delta, dq_shares, dq, own_dk, own_dv, completion_offsets, prefix,
        scale, scale * LOG2E, heads, kv_heads, new, seen, rows,
        DIM=dim, BLOCK_C=16, BLOCK_N=blocks["BLOCK_N"], num_warps=4, maxnreg=255,
    )  # fmt: skip
    return dq, dk, dv, own_dk, own_dv


def _fake_forward(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    *_: object,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (query, prompt_key, prompt_value, own_key, own_value))


_forward = operator("completion_attention", launch_forward, _fake_forward)
_backward = operator("completion_attention_backward", launch_backward, _fake_backward)


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
    there = processors(device)

    def at_work(splits: int) -> float:
        return programs * splits / (triton.cdiv(programs * splits, there) * there)

    choices = range(1, max(1, min(key_blocks // 2, 16)) + 1)
    return next((splits for splits in choices if at_work(splits) >= 0.9), max(choices, key=at_work))
