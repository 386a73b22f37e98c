"""The trie GRPO loss in one launch: from logits of visited nodes to loss, per-token terms and dlogits.

One program holds one row of logits z [K] on chip (K up to 8,192) and serves every token sampled at it. Mask and prior
are rebuilt from the trie's tables (trie_rows.py); s = (z + prior) / temperature, log p = log_softmax(s) over the valid
codes. For the tokens t of the row, with codes c_t, token weights w_t and advantages A_t:

    loss  = sum_t w_t (beta KL_t - min(r_t A_t, clip(r_t) A_t)),    r_t = exp(log p[c_t] - old_t)
    h_t   = d loss / d log p[c_t] = -w_t r_t A_t, or 0 where the clipped branch is the smaller
            (k3 adds w_t beta (1 - exp(d_t)), d_t = log ref[c_t] - log p[c_t], since k3 = exp(d) - d - 1)
    d loss / d s[k] = sum_t h_t [k = c_t] - p[k] sum_t h_t
            (exact KL adds sum_t(w_t) beta p[k] (log p[k] - log ref[k] - KL), for d log p[j] / d s[k] = [j = k] - p[k])
    d loss / d z = d loss / d s / temperature, and 0 where not valid.

Each row's program computes its group's statistics (mean, standard deviation, or max@k) from the G rewards, and token
weights from ``counted``. Losses of rows are summed outside in a fixed order and nothing is added atomically, so runs
are bit-equal.

Bytes: logits, reference and dlogits are touched once, 3 R K elements (6 R K bytes in bf16), plus K / 4 bytes of tables
a row, 4 bytes a row and child, 29 bytes a token; the backward multiplies dlogits by a scalar, 2 R K elements more. A
row of forced tokens only writes its zeros. FLOPs: about 25 a code. The sm_90 code issues about 95 instructions a code:
wide bf16 rows wait for instructions about twice as long as for memory (float32 rows do not), and below about 1,000 rows
of 256 the launch is all. The loss "dapo" reads all T counted flags in every row, max@k makes G^2 comparisons a row.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx

from negfast.kernels.dispatch import check_tensors, runs_triton
from negfast.kernels.operators import operator
from negfast.kernels.trie_grpo_kernel import trie_grpo_kernel
from negfast.kernels.trie_grpo_reference import (
    GRPOObjective,
    GRPOTerms,
    SampledTokens,
    set_shares_on,
    trie_grpo_reference,
)
from negfast.kernels.trie_rows import RowInputs, RowTokens, TrieRows, TrieTables, row_inputs
from negfast.kernels.trie_rows_kernel import row_block
from negfast.kernels.trie_rows_reference import dense_policy, log_policy

__all__ = ["GRPOObjective", "GRPOTerms", "trie_grpo"]


def trie_grpo(
    logits: Tensor,
    tables: TrieTables,
    rows: TrieRows,
    tokens: RowTokens,
    rewards: Tensor,
    objective: GRPOObjective,
    *,
    reference: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    check_rewards: bool = True,
) -> GRPOTerms:
    """GRPO's loss over the trie; the same result as ``trie_grpo_reference`` over ``dense_policy(tables, rows)``.

    logits         [R, K] float32, bfloat16 or float16 (on the CPU also float64), rows of any levels
    tokens         of C = B * G completions, group by group; all counted tokens of a row belong to one group
    rewards        float32 [B, G]
    reference      [R, K] the frozen policy's logits in the dtype of ``logits``; needed where beta > 0
    old_log_prob   float32 [L, C] of the policy that sampled; None: on-policy
    check_rewards  raise ValueError on NaN or inf, which waits for the device; False for graph capture

    Returns terms per token [L, C] and a loss whose gradient reaches ``logits``. Raises ValueError on unsupported
    shapes, dtypes and combinations.
    """
    if objective.beta > 0 and reference is None:
        raise ValueError("reference: found None, expected logits since beta > 0")
    if objective.set_size > rewards.shape[-1]:
        raise ValueError(f"set_size: found {objective.set_size}, expected 1 to the group size {rewards.shape[-1]}")
    if check_rewards and not torch.isfinite(rewards).all():
        raise ValueError("rewards: found NaN or inf, expected finite numbers")
    reference = reference if objective.beta > 0 else None
    inputs = row_inputs(logits, tables, rows)
    check_tokens(logits, tokens, rewards, reference, old_log_prob)
    if not runs_triton(logits.device, "trie_grpo"):
        return _eager(logits, tables, rows, tokens, rewards, objective, reference, old_log_prob)
    row_block(logits.shape[1])
    call = Call(inputs, tables.weight, tokens, rewards, objective, reference, old_log_prob)
    return GRPOTerms(*TrieGRPO.apply(logits, call))


def check_tokens(
    logits: Tensor, tokens: RowTokens, rewards: Tensor, reference: Tensor | None, old_log_prob: Tensor | None
) -> None:
    """Raise ValueError unless what concerns tokens has the shape, dtype and device that ``trie_grpo`` names."""
    shape, completions, total = tuple(tokens.code.shape), rewards.numel(), tokens.code.numel()
    if len(shape) != 2 or shape[1] != completions:
        raise ValueError(f"tokens.code: found shape {shape}, expected [levels, {completions}]")
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    expected = {
        "reference": (reference, tuple(logits.shape), logits.dtype),
        "tokens.start": (tokens.start, (len(logits) + 1,), torch.int32),
        "tokens.token": (tokens.token, (total,), torch.int32),
        "tokens.completion": (tokens.completion, (total,), torch.int32),
        "tokens.row": (tokens.row, (total,), torch.int32),
        "tokens.code": (tokens.code, shape, torch.int32),
        "tokens.counted": (tokens.counted, shape, torch.bool),
        "rewards": (rewards, tuple(rewards.shape), real),
        "old_log_prob": (old_log_prob, shape, real),
    }
    check_tensors(expected, logits.device)


def _eager(
    logits: Tensor,
    tables: TrieTables,
    rows: TrieRows,
    tokens: RowTokens,
    rewards: Tensor,
    objective: GRPOObjective,
    reference: Tensor | None,
    old_log_prob: Tensor | None,
) -> GRPOTerms:
    """By the reference over the dense form of the rows; any device, also float64."""
    valid, log_prior = dense_policy(tables, rows, torch.promote_types(logits.dtype, torch.float32))
    if reference is not None:
        reference = log_policy(reference, valid, log_prior, objective.temperature)
    code = tokens.code
    completion = torch.arange(code.shape[1], device=code.device).expand_as(code)
    flat = SampledTokens(tokens.row.long(), code.flatten().long(), completion.flatten(), tokens.counted.flatten())
    old = None if old_log_prob is None else old_log_prob.flatten()
    terms = trie_grpo_reference(logits, valid, log_prior, flat, rewards, objective, len(code), reference, old)
    return GRPOTerms(terms.loss, *(term.view(code.shape) for term in terms.per_token))


@dataclass(frozen=True)
class Call:
    """What a launch reads beside the logits."""

    rows: RowInputs
    prior_weight: float
    tokens: RowTokens
    rewards: Tensor
    objective: GRPOObjective
    reference: Tensor | None
    old_log_prob: Tensor | None


class TrieGRPO(torch.autograd.Function):
    """(loss, log_prob, kl, entropy, clipped) of logits; the launch that computes them makes dlogits too."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, call: Call) -> tuple[Tensor, ...]:
        tokens = call.tokens
        loss, *per_token, dlogits = _operator(
            logits,
            call.rows,
            call.prior_weight,
            (tokens.start, tokens.token, tokens.completion, tokens.code, tokens.counted),
            call.rewards,
            call.reference,
            call.old_log_prob,
            json.dumps(asdict(call.objective)),
        )
        ctx.save_for_backward(dlogits)
        ctx.mark_non_differentiable(*per_token)
        return loss, *per_token

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        (dlogits,) = ctx.saved_tensors
        return grad_loss.to(dlogits.dtype) * dlogits, None


def launch(
    logits: Tensor,
    rows: Sequence[Tensor | None],
    prior_weight: float,
    tokens: Sequence[Tensor],
    rewards: Tensor,
    reference: Tensor | None,
    old_log_prob: Tensor | None,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log_prob, kl, entropy, clipped, dlogits) by one launch of the kernel and one sum over rows.

    ``rows`` are RowInputs, ``tokens`` the start, token, completion, code and counted of RowTokens, ``objective`` is
    a GRPOObjective in JSON, since an operator takes no objects.
    """
    given, inputs = GRPOObjective(**json.loads(objective)), RowInputs._make(rows)
    start, token, completion, code, counted = tokens
    (count, codebook), group = logits.shape, rewards.shape[-1]
    logits = logits.contiguous()
    dlogits = torch.empty_like(logits)
    loss = logits.new_empty(count, dtype=torch.float32)
    log_prob, kl, entropy, clipped = (code.new_empty(code.shape, dtype=torch.float32) for _ in range(4))
    if count:
        trie_grpo_kernel[(count,)](
            logits,
            None if reference is None else reference.contiguous(),
            dlogits,
            loss,
            log_prob,
            kl,
            entropy,
            clipped,
            start,
            token,
            completion,
            code.contiguous(),
            counted.contiguous(),
            None if old_log_prob is None else old_log_prob.contiguous(),
            rewards.contiguous(),
            set_shares_on(logits.device, torch.float32, group, given.set_size) if given.set_size > 1 else None,
            *inputs,
            codebook,
            inputs.words,
            prior_weight,
            1 / given.temperature,
            given.clip_low,
            given.clip_high,
            given.beta,
            code.shape[1],
            code.shape[0],
            **specialise(given, codebook, group),
        )
    return loss.sum(), log_prob, kl, entropy, clipped, dlogits


def _fake(logits: Tensor, rows: object, weight: float, tokens: Sequence[Tensor], *_: object) -> tuple[Tensor, ...]:
    code = tokens[3]
    terms = [code.new_empty(code.shape, dtype=torch.float32) for _ in range(4)]
    return logits.new_empty((), dtype=torch.float32), *terms, torch.empty_like(logits)


_operator = operator("trie_grpo", launch, _fake)


def specialise(objective: GRPOObjective, codebook: int, group: int) -> dict[str, Any]:
    """The kernel's compile-time settings: the objective's and block sizes. Nothing here varies with the batch."""
    baseline = "group"
    if objective.set_size:
        baseline = "others" if objective.set_size == 1 else "set"
    return {
        "LOSS": objective.loss,
        "EXACT_KL": objective.kl == "exact",
        "SCALE_REWARDS": objective.scale_rewards,
        "BASELINE": baseline,
        "BLOCK_T": min(max(triton.next_power_of_2(group), 16), 32),
        "GROUP": group,
        "BLOCK_G": triton.next_power_of_2(group),
        **row_block(codebook),
    }
