"""Weighted cross entropy of semantic-ID codes over the valid children of trie nodes: loss and dlogits in one launch.

The SFT loss. With the mask and prior of trie_rows.py, log p = log_softmax(z + prior) over a row's valid codes, and for
the targets t of the row (one, or the items of a future that share a node) with codes c_t and weights w_t >= 0:

    loss = -sum_t w_t log p[c_t]
    d loss / d z[k] = p[k] sum_t w_t - sum_t w_t [k = c_t]

Losses of rows are summed outside in a fixed order: runs are bit-equal.

Bytes: logits and dlogits once, 2 R K elements (4 R K bytes in bf16), plus K / 8 bytes of child bits a row, 4 bytes a
row and child, 16 a target. FLOPs: about 12 a code, so memory bounds it.
"""

import inspect

import torch
import triton
import triton.language as tl
from negfast.kernels.dispatch import check_tensors, runs_triton
from negfast.kernels.trie_grpo import log_policy
from negfast.kernels.trie_rows import (
    RowTokens,
    TrieRows,
    TrieTables,
    dense_policy,
    load_log_mass,
    log2_softmax_row,
    row_block,
    sampled_log_prob,
)
from torch import Tensor


def sid_cross_entropy_reference(
    logits: Tensor, valid: Tensor, log_prior: Tensor | None, row: Tensor, code: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, log_prob [T]) over dense masks and priors [R, K], in float32, or float64 where ``logits`` are.

    row, code int64 [T]; weight [T]. log_prob is detached and 0 where the weight is.
    """
    log_prob = log_policy(logits, valid, log_prior, temperature=1.0)[row, code]
    log_prob = torch.where(weight > 0, log_prob, 0.0)
    return -(weight * log_prob).sum(), log_prob.detach()


def sid_cross_entropy(
    logits: Tensor, tables: TrieTables, rows: TrieRows, tokens: RowTokens, code: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, log_prob [T]); the same as ``sid_cross_entropy_reference`` over ``dense_policy(tables, rows)``.

    logits  [R, K] float32, bfloat16 or float16 (on the CPU also float64)
    tokens  the row of each target (as ``RowTokens.from_rows``, T targets in all)
    code    int32 [T] the target's code; an infinite loss where it is not valid
    weight  float32 [T], 0 for padding; what the loss is averaged over is the caller's choice

    The loss has a gradient for ``logits``. Raises ValueError on unsupported shapes, dtypes and devices.
    """
    check_arguments(logits, tables, rows, tokens, code, weight)
    if not runs_triton(logits.device):
        return eager_terms(logits, tables, rows, tokens, code, weight)
    loss, log_prob, _ = _op(
        logits,
        tables.first_child,
        tables.child_bits,
        tables.leaf_count,
        tables.log_mass,
        rows.node,
        rows.mass_row,
        rows.seen_begin,
        rows.seen_end,
        rows.seen_node,
        rows.seen_log,
        tokens.start,
        tokens.token,
        tokens.answer,
        tokens.row,
        code,
        weight,
        list(tables.level_base),
        tables.weight,
    )
    return loss, log_prob


@torch.library.custom_op("negfast::sid_cross_entropy", mutates_args=())
def _op(
    logits: Tensor,
    first_child: Tensor,
    child_bits: Tensor,
    leaf_count: Tensor,
    log_mass: Tensor | None,
    node: Tensor,
    mass_row: Tensor | None,
    seen_begin: Tensor,
    seen_end: Tensor,
    seen_node: Tensor,
    seen_log: Tensor,
    token_start: Tensor,
    token: Tensor,
    token_answer: Tensor,
    token_row: Tensor,
    code: Tensor,
    weight: Tensor,
    level_base: list[int],
    prior_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log_prob, dlogits)"""
    tables = TrieTables(
        first_child=first_child,
        child_bits=child_bits,
        leaf_count=leaf_count,
        level_base=tuple(level_base),
        codebook=logits.shape[1],
        log_mass=log_mass,
        weight=prior_weight,
    )
    rows = TrieRows(node, seen_begin, seen_end, seen_node, seen_log, mass_row)
    return launch(logits, tables, rows, RowTokens(token_start, token, token_answer, token_row), code, weight)


OPERATOR_INPUTS = tuple(inspect.signature(_op._init_fn).parameters)


@_op.register_fake
def _(*arguments):
    given = dict(zip(OPERATOR_INPUTS, arguments, strict=True))
    logits, weight = given["logits"], given["weight"]
    return weight.new_empty(()), torch.empty_like(weight), torch.empty_like(logits)


def _save_dlogits(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[2])


def _backward(ctx, grad_loss, *_):
    (dlogits,) = ctx.saved_tensors
    return (grad_loss.to(dlogits.dtype) * dlogits, *[None] * (len(OPERATOR_INPUTS) - 1))


_op.register_autograd(_backward, setup_context=_save_dlogits)


def check_arguments(
    logits: Tensor, tables: TrieTables, rows: TrieRows, tokens: RowTokens, code: Tensor, weight: Tensor
) -> None:
    """Raise ValueError unless every tensor has the shape, dtype and device that ``sid_cross_entropy`` names."""
    count, codebook = logits.shape
    total = (code.numel(),)
    if runs_triton(logits.device):
        row_block(codebook)
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"logits: found {logits.dtype}, expected float32, bfloat16 or float16")
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    expected = {
        "child_bits": (tables.child_bits, (len(tables.first_child) - 1, -(-codebook // 32)), torch.int32),
        "node": (rows.node, (count,), torch.int32),
        "mass_row": (rows.mass_row, (count,), torch.int32),
        "seen_begin": (rows.seen_begin, (count,), torch.int32),
        "seen_end": (rows.seen_end, (count,), torch.int32),
        "seen_log": (rows.seen_log, (len(rows.seen_node),), torch.float32),
        "tokens.start": (tokens.start, (count + 1,), torch.int32),
        "tokens.token": (tokens.token, total, torch.int32),
        "tokens.row": (tokens.row, total, torch.int32),
        "code": (code, total, torch.int32),
        "weight": (weight, total, real),
    }
    check_tensors(expected, logits.device)
    if tables.log_mass is not None and rows.mass_row is None:
        raise ValueError("mass_row: found None, expected a tensor since the tables hold a prior")


def eager_terms(
    logits: Tensor, tables: TrieTables, rows: TrieRows, tokens: RowTokens, code: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``sid_cross_entropy`` by the reference over the dense form of the rows; any device, also float64."""
    valid, log_prior = dense_policy(tables, rows, torch.promote_types(logits.dtype, torch.float32))
    return sid_cross_entropy_reference(logits, valid, log_prior, tokens.row.long(), code.long(), weight)


def eager(logits: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """What ``launch`` returns, by ``eager_terms`` and autograd."""
    leaf = logits.detach().requires_grad_()
    loss, log_prob = eager_terms(leaf, *arguments)
    return loss.detach(), log_prob, torch.autograd.grad(loss, leaf)[0]


def launch(
    logits: Tensor, tables: TrieTables, rows: TrieRows, tokens: RowTokens, code: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log_prob, dlogits) by one launch of the kernel and one sum over rows."""
    count, codebook = logits.shape
    logits = logits.contiguous()
    dlogits = torch.empty_like(logits)
    loss = logits.new_empty(count, dtype=torch.float32)
    log_prob = torch.empty_like(weight)
    if count:
        sid_cross_entropy_kernel[(count,)](
            logits,
            dlogits,
            loss,
            log_prob,
            tokens.start,
            tokens.token,
            code.contiguous(),
            weight.contiguous(),
            tables.first_child,
            tables.child_bits,
            tables.log_mass,
            rows.node,
            rows.mass_row,
            rows.seen_begin,
            rows.seen_end,
            rows.seen_node,
            rows.seen_log,
            codebook,
            tables.child_bits.shape[1],
            len(tables.leaf_count),
            tables.weight,
            BLOCK_T=16,
            **row_block(codebook),
        )
    return loss.sum(), log_prob, dlogits


@triton.jit
def sid_cross_entropy_kernel(
    logits,
    dlogits,
    loss,
    log_prob,
    token_start,
    tokens,
    code,
    weight,
    first_child,
    child_bits,
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
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0)
    codes = tl.arange(0, BLOCK_K)
    first_code = row.to(tl.int64) * codebook
    z = tl.load(logits + first_code + codes, mask=codes < codebook, other=0.0).to(tl.float32)
    valid, prior = load_log_mass(
        row, codes, first_child, child_bits, log_mass, node, mass_row, seen_begin, seen_end, seen_node, seen_log,
        words, nodes,
    )  # fmt: skip
    log_p, p = log2_softmax_row((z + prior * prior_weight) / LN2, valid)

    row_loss = 0.0
    total = 0.0
    target = tl.zeros_like(z)  # sum of the weights of the targets at each code
    begin = tl.load(token_start + row)
    end = tl.load(token_start + row + 1)
    for first in range(begin, end, BLOCK_T):
        slot = tl.arange(0, BLOCK_T)
        live = slot < end - first
        token = tl.load(tokens + first + slot, mask=live, other=0)
        w = tl.load(weight + token, mask=live, other=0.0)
        sampled = tl.load(code + token, mask=w > 0, other=0)
        lp = tl.where(w > 0, sampled_log_prob(log_p, sampled), 0.0)
        row_loss -= tl.sum(w * lp, 0)
        total += tl.sum(w, 0)
        for other in range(0, tl.minimum(end - first, BLOCK_T)):
            its_code = tl.load(code + tl.load(tokens + first + other))
            target += tl.where(codes == its_code, tl.sum(tl.where(slot == other, w, 0.0), 0), 0.0)
        tl.store(log_prob + token, lp, mask=live)

    # where no code is valid, p is uniform: such a row must have no weight
    tl.store(dlogits + first_code + codes, tl.where(valid, p * total - target, 0.0), mask=codes < codebook)
    tl.store(loss + row, row_loss)
