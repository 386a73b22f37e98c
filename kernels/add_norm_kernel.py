"""The two kernels of add_norm.py, which has their formula and bytes. A program holds a row at a time."""

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(stream, branch, weight, total, normed, rstd, eps, size, BLOCK: tl.constexpr):
    """``branch`` and ``total`` are None where nothing is added."""
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(stream + row + column, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        x += tl.load(branch + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total.dtype.element_ty)
        tl.store(total + row + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(rstd + tl.program_id(0), scale)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + column, x * scale * w, mask=inside)


@triton.jit
def add_norm_backward_kernel(
    grad, total_grad, total, weight, rstd, dstream, dbranch, dweight, rows, size, BLOCK: tl.constexpr
):
    """A program owns every n-th row and writes what they give to the weight, [programs, size]. ``total_grad`` is None
    where nothing reads the sum, ``dbranch`` where it is ``dstream``."""
    column = tl.arange(0, BLOCK)
    inside = column < size
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(number, tl.int64) * size + column
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + number)
        x = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * scale
        dw += g * x
        g *= w
        d = (g - x * (tl.sum(g * x, 0) / size)) * scale
        if total_grad is not None:
            d += tl.load(total_grad + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dstream + at, d, mask=inside)
        if dbranch is not None:
            tl.store(dbranch + at, d, mask=inside)
    tl.store(dweight + tl.program_id(0) * size + column, dw, mask=inside)
