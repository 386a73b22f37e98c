"""Cross entropy of semantic-ID codes over the valid children of trie nodes, a target a row: the SFT loss.

With the mask and prior of trie_rows.py, log p = log_softmax(z + prior) over a row's valid codes, and for its target c

    nll = -log p[c],    d nll / d z[k] = p[k] - [k = c]

The forward keeps nothing but the logits; the backward, the same kernel, rebuilds p and multiplies by what flows back
to the row. A row without a valid code (padding) has loss 0 and no gradient.

Bytes: logits read twice and dlogits written, 3 R K elements (6 R K bytes in bf16), plus, each way, K / 8 bytes of
child bits a row, 4 bytes a row and child, 28 a row. FLOPs: about 12 a code and pass, so memory bounds it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from negfast.kernels.dispatch import check_tensors, runs_triton
from negfast.kernels.operators import operator
from negfast.kernels.sid_cross_entropy_kernel import sid_cross_entropy_kernel
from negfast.kernels.sid_cross_entropy_reference import sid_cross_entropy_reference
from negfast.kernels.trie_rows import RowInputs, TrieRows, TrieTables, row_inputs
from negfast.kernels.trie_rows_kernel import row_block
from negfast.kernels.trie_rows_reference import dense_policy


def sid_cross_entropy(logits: Tensor, tables: TrieTables, rows: TrieRows, code: Tensor) -> Tensor:
    """nll [R]; the same as ``sid_cross_entropy_reference`` over ``dense_policy(tables, rows)``.

    logits  [R, K] float32, bfloat16 or float16 (on the CPU also float64)
    code    int32 [R] the target; infinite loss where it is not valid

    Returns float32 (float64 for float64), with a gradient for ``logits``. Raises ValueError on unsupported shapes,
    dtypes and devices.
    """
    inputs = row_inputs(logits, tables, rows)
    check_tensors({"code": (code, (len(logits),), torch.int32)}, logits.device)
    if not runs_triton(logits.device, "sid_cross_entropy"):
        valid, log_prior = dense_policy(tables, rows, torch.promote_types(logits.dtype, torch.float32))
        return sid_cross_entropy_reference(logits, valid, log_prior, code.long())
    row_block(logits.shape[1])
    return SidCrossEntropy.apply(logits.contiguous(), code.contiguous(), inputs, tables.weight)


class SidCrossEntropy(torch.autograd.Function):
    """nll of logits and code."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, code: Tensor, rows: RowInputs, prior_weight: float) -> Tensor:
        ctx.save_for_backward(logits, code, *rows)
        ctx.prior_weight = prior_weight
        return _forward(logits, code, rows, prior_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, code, *rows = ctx.saved_tensors
        return _backward(grad.contiguous(), logits, code, rows, ctx.prior_weight), None, None, None


def launch_forward(logits: Tensor, code: Tensor, rows: Sequence[Tensor | None], prior_weight: float) -> Tensor:
    """nll float32 [R]; ``rows`` are RowInputs."""
    nll = logits.new_empty(len(logits), dtype=torch.float32)
    _launch(logits, code, RowInputs._make(rows), prior_weight, nll=nll)
    return nll


def launch_backward(
    grad: Tensor, logits: Tensor, code: Tensor, rows: Sequence[Tensor | None], prior_weight: float
) -> Tensor:
    """dlogits"""
    dlogits = torch.empty_like(logits)
    _launch(logits, code, RowInputs._make(rows), prior_weight, grad=grad, dlogits=dlogits)
    return dlogits


def _launch(
    logits: Tensor,
    code: Tensor,
    rows: RowInputs,
    prior_weight: float,
    *,
    nll: Tensor | None = None,
    grad: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> None:
    if len(logits):
        sid_cross_entropy_kernel[(len(logits),)](
            logits, code, nll, grad, dlogits, *rows, logits.shape[1], rows.words, prior_weight,
            **row_block(logits.shape[1]),
        )  # fmt: skip


def _fake_forward(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


def _fake_backward(grad: Tensor, logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits)


_forward = operator("sid_cross_entropy", launch_forward, _fake_forward)
_backward = operator("sid_cross_entropy_backward", launch_backward, _fake_backward)
