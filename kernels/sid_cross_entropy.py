"""Cross entropy of semantic-ID codes over the valid children of trie nodes, a target a row: the SFT loss.

With the mask and prior of trie_rows.py, log p = log_softmax(z + prior) over a row's valid codes, and for its target c

    nll = -log p[c],    d nll / d z[k] = p[k] - [k = c]

The forward keeps nothing but the logits; the backward, the same kernel, rebuilds p and multiplies by what flows back
to the row. A row without a valid code (padding) has loss 0 and no gradient.

Bytes: logits read twice and dlogits written, 3 R K elements (6 R K bytes in bf16), plus, each way, K / 8 bytes of
child bits a row, 4 bytes a row and child, 28 a row. FLOPs: about 12 a code and pass, so memory bounds it.
"""

import torch
import triton
import triton.language as tl
from negfast.kernels.dispatch import check_tensors, runs_triton
from negfast.kernels.row_kernels import load_log_mass, log2_softmax_row, row_block, sampled_log_prob
from negfast.kernels.trie_grpo import log_policy
from negfast.kernels.trie_rows import RowInputs, TrieRows, TrieTables, dense_policy, row_inputs
from torch import Tensor


def sid_cross_entropy_reference(logits: Tensor, valid: Tensor, log_prior: Tensor | None, code: Tensor) -> Tensor:
    """nll [R] over dense masks and priors [R, K], code int64 [R]; float32, or float64 where ``logits`` are."""
    log_p = log_policy(logits, valid, log_prior, temperature=1.0).gather(1, code.unsqueeze(1))[:, 0]
    return torch.where(valid.any(-1), -log_p, 0.0)


def sid_cross_entropy(logits: Tensor, tables: TrieTables, rows: TrieRows, code: Tensor) -> Tensor:
    """nll [R]; the same as ``sid_cross_entropy_reference`` over ``dense_policy(tables, rows)``.

    logits  [R, K] float32, bfloat16 or float16 (on the CPU also float64)
    code    int32 [R] the target; infinite loss where it is not valid

    Returns float32 (float64 for float64), with a gradient for ``logits``. Raises ValueError on unsupported shapes,
    dtypes and devices.
    """
    inputs = row_inputs(logits, tables, rows)
    check_tensors({"code": (code, (len(logits),), torch.int32)}, logits.device)
    if not runs_triton(logits.device):
        return eager(logits, tables, rows, code)
    row_block(logits.shape[1])
    return _forward(logits.contiguous(), code.contiguous(), *inputs, tables.weight)


def eager(logits: Tensor, tables: TrieTables, rows: TrieRows, code: Tensor) -> Tensor:
    """``sid_cross_entropy`` by the reference over the dense form of the rows; any device, also float64."""
    valid, log_prior = dense_policy(tables, rows, torch.promote_types(logits.dtype, torch.float32))
    return sid_cross_entropy_reference(logits, valid, log_prior, code.long())


@torch.library.custom_op("negfast::sid_cross_entropy", mutates_args=())
def _forward(
    logits: Tensor,
    code: Tensor,
    child_bits: Tensor,
    word_first: Tensor,
    log_mass: Tensor | None,
    node: Tensor,
    mass_row: Tensor | None,
    seen_begin: Tensor,
    seen_end: Tensor,
    seen_node: Tensor,
    seen_log: Tensor,
    prior_weight: float,
) -> Tensor:
    """nll float32 [R]"""
    nll = logits.new_empty(len(logits), dtype=torch.float32)
    rows = RowInputs(child_bits, word_first, log_mass, node, mass_row, seen_begin, seen_end, seen_node, seen_log)
    _launch(logits, code, rows, prior_weight, nll, None, None)
    return nll


@_forward.register_fake
def _(logits, *_):
    return logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.custom_op("negfast::sid_cross_entropy_backward", mutates_args=())
def _backward(
    grad: Tensor,
    logits: Tensor,
    code: Tensor,
    child_bits: Tensor,
    word_first: Tensor,
    log_mass: Tensor | None,
    node: Tensor,
    mass_row: Tensor | None,
    seen_begin: Tensor,
    seen_end: Tensor,
    seen_node: Tensor,
    seen_log: Tensor,
    prior_weight: float,
) -> Tensor:
    """dlogits"""
    dlogits = torch.empty_like(logits)
    rows = RowInputs(child_bits, word_first, log_mass, node, mass_row, seen_begin, seen_end, seen_node, seen_log)
    _launch(logits, code, rows, prior_weight, None, grad, dlogits)
    return dlogits


@_backward.register_fake
def _(grad, logits, *_):
    return torch.empty_like(logits)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.prior_weight = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    return _backward(grad.contiguous(), *ctx.saved_tensors, ctx.prior_weight), *[None] * 11


_forward.register_autograd(_differentiate, setup_context=_save)


def _launch(
    logits: Tensor,
    code: Tensor,
    rows: RowInputs,
    prior_weight: float,
    nll: Tensor | None,
    grad: Tensor | None,
    dlogits: Tensor | None,
) -> None:
    if len(logits):
        sid_cross_entropy_kernel[(len(logits),)](
            logits, code, nll, grad, dlogits, *rows, logits.shape[1], *rows.strides, prior_weight,
            **row_block(logits.shape[1]),
        )  # fmt: skip


@triton.jit
def sid_cross_entropy_kernel(
    logits,
    code,
    nll,
    grad,
    dlogits,
    child_bits,
    word_first,
    log_mass,
    node,
    mass_row,
    seen_begin,
    seen_end,
    seen_node,
    seen_log,
    codebook,
    words,
    nodes,
    prior_weight,
    BLOCK_K: tl.constexpr,
):
    """One row a program: the loss where ``nll`` is given, the gradient where ``dlogits`` is."""
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0)
    codes = tl.arange(0, BLOCK_K)
    first_code = row.to(tl.int64) * codebook
    z = tl.load(logits + first_code + codes, mask=codes < codebook, other=0.0).to(tl.float32)
    valid, prior = load_log_mass(
        row, codes, child_bits, word_first, log_mass, node, mass_row, seen_begin, seen_end, seen_node, seen_log,
        words, nodes,
    )  # fmt: skip
    log_p, p = log2_softmax_row((z + prior * prior_weight) / LN2, valid)
    target = tl.load(code + row)
    if nll is not None:
        loss = -sampled_log_prob(log_p, codes, tl.full((1,), 0, tl.int32) + target)
        loss = tl.where(tl.max(valid.to(tl.int32), 0) != 0, loss, 0.0)
        tl.store(nll + row + tl.arange(0, 1), loss)
    if dlogits is not None:
        slope = p - tl.where(codes == target, 1.0, 0.0)
        gradient = tl.where(valid, slope * tl.load(grad + row), 0.0)
        tl.store(dlogits + first_code + codes, gradient, mask=codes < codebook)
