"""Triton code of both attentions: tiles of rows, a step of online softmax and of its gradient.

Rows are [.., heads, DIM]; scores are in units of log2 (log2(e) is folded into the scale), so exp2 and log2 do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


def row_dots(out: Tensor, grad: Tensor) -> Tensor:
    """float32 [..., H]: the dot product of each row of out and grad [..., H, D]."""
    rows, dim = out.numel() // out.shape[-1], out.shape[-1]
    dots = out.new_empty(out.shape[:-1], dtype=torch.float32)
    row_dots_kernel[(triton.cdiv(rows, 32),)](out, grad, dots, rows, DIM=dim, BLOCK=32, num_warps=4)
    return dots


@triton.jit
def row_dots_kernel(out, grad, dots, rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    product = load_rows(out, row, inside, DIM).to(tl.float32) * load_rows(grad, row, inside, DIM)
    tl.store(dots + row, tl.sum(product, 1), mask=inside)


@triton.jit
def load_rows(base, row, inside, DIM: tl.constexpr):
    """[N, DIM]: the rows ``row`` [N], zeros where not ``inside``."""
    return tl.load(base + row[:, None] * DIM + tl.arange(0, DIM)[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(base, row, values, inside, DIM: tl.constexpr):
    tl.store(base + row[:, None] * DIM + tl.arange(0, DIM)[None, :], values, mask=inside[:, None])


@triton.jit
def dot(a, b):
    """float32 [M, N] of [M, D] and [N, D]."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


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
def merge(acc, top, total, score, v):
    """The same for one key a row: score [M] and v [M, D], or the result of keys attended to before and their lse."""
    new_top = tl.maximum(top, score)
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    keep, p = tl.exp2(top - shift), tl.exp2(score - shift)
    return acc * keep[:, None] + p[:, None] * v, new_top, total * keep + p


@triton.jit
def key_gradients(dk, dv, k, v, q, g, lse, delta, visible, scale_log2):
    """Adds to dk (but for the scale) and dv [N, D] what queries q with gradients g [M, D] give; also ds [N, M]."""
    p = tl.exp2(dot(k, q) * scale_log2 - lse[None, :])
    p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
    ds = (p * (dot(v, g) - delta[None, :])).to(q.dtype)
    return tl.dot(ds, q, dk, input_precision="ieee"), dv, ds
