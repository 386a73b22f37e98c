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
from dataclasses import asdict
from functools import lru_cache

import torch
import triton
from negfast.kernels.dispatch import check_tensors, runs_triton
from negfast.kernels.row_kernels import row_block
from negfast.kernels.trie_grpo import (
    GRPOObjective,
    GRPOTerms,
    SampledTokens,
    log_policy,
    set_shares,
    trie_grpo_reference,
)
from negfast.kernels.trie_grpo_kernel import trie_grpo_kernel
from negfast.kernels.trie_rows import RowInputs, RowTokens, TrieRows, TrieTables, dense_policy, row_inputs
from torch import Tensor

REFERENCE_KINDS = ("logits", "log_policy")


def trie_grpo(
    logits: Tensor,
    tables: TrieTables,
    rows: TrieRows,
    tokens: RowTokens,
    code: Tensor,
    counted: Tensor,
    rewards: Tensor,
    objective: GRPOObjective,
    reference: Tensor | None = None,
    reference_kind: str = "logits",
    old_log_prob: Tensor | None = None,
    answer_weight: Tensor | None = None,
    check_rewards: bool = True,
) -> GRPOTerms:
    """GRPO's loss over the trie; the same result as ``trie_grpo_reference`` over ``dense_policy(tables, rows)``.

    logits         [R, K] float32, bfloat16 or float16 (on the CPU also float64), rows of any levels
    tokens         the row of every token; token n = level * B*G + answer
    code           int32 [L, B*G]  sampled codes
    counted        bool  [L, B*G]  False for forced tokens and padding; every token still belongs to some row
    rewards        float32 [B, G]
    reference      [R, K] the frozen policy's logits in the dtype of ``logits``, under the same prior
                   (reference_kind "logits"), or its float32 log-probabilities ("log_policy"); needed where beta > 0
    old_log_prob   float32 [L, B*G] of the policy that sampled; None: on-policy
    answer_weight  float32 [B*G] or None
    check_rewards  raise ValueError on NaN or inf, which waits for the device; False for graph capture

    All counted tokens of a row belong to one group. Returns terms per token [L, B*G] and a loss whose gradient reaches
    ``logits``. Raises ValueError on unsupported shapes, dtypes and combinations.
    """
    if reference_kind not in REFERENCE_KINDS:
        raise ValueError(f"reference_kind: found {reference_kind!r}, expected one of {', '.join(REFERENCE_KINDS)}")
    if objective.beta > 0 and reference is None:
        raise ValueError("reference: found None, expected logits or log-probabilities since beta > 0")
    if objective.set_size > rewards.shape[-1]:
        raise ValueError(f"set_size: found {objective.set_size}, expected 1 to the group size {rewards.shape[-1]}")
    if check_rewards and not torch.isfinite(rewards).all():
        raise ValueError("rewards: found NaN or inf, expected finite numbers")
    reference = reference if objective.beta > 0 else None
    optional = (reference, reference_kind, old_log_prob, answer_weight)
    inputs = row_inputs(logits, tables, rows)
    check_tokens(logits, tokens, code, counted, rewards, *optional)
    if not runs_triton(logits.device):
        return eager_terms(logits, tables, rows, tokens, code, counted, rewards, objective, *optional)
    row_block(logits.shape[1])
    settings = {"objective": asdict(objective), "reference_kind": reference_kind, "weight": tables.weight}
    loss, *per_token, _ = _op(
        logits, *inputs, tokens.start, tokens.token, tokens.answer, code, counted, rewards, reference, old_log_prob,
        answer_weight, json.dumps(settings),
    )  # fmt: skip
    return GRPOTerms(loss, *(term.detach() for term in per_token))


@torch.library.custom_op("negfast::trie_grpo", mutates_args=())
def _op(
    logits: Tensor,
    child_bits: Tensor,
    word_first: Tensor,
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
    code: Tensor,
    counted: Tensor,
    rewards: Tensor,
    reference: Tensor | None,
    old_log_prob: Tensor | None,
    answer_weight: Tensor | None,
    settings: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log_prob, kl, entropy, clipped, dlogits); a custom operator takes no objects, so the settings are JSON."""
    given = json.loads(settings)
    rows = RowInputs(child_bits, word_first, log_mass, node, mass_row, seen_begin, seen_end, seen_node, seen_log)
    tokens = token_start, token, token_answer
    objective = GRPOObjective(**given["objective"])
    optional = (reference, given["reference_kind"], old_log_prob, answer_weight)
    return _launch(logits, rows, given["weight"], tokens, code, counted, rewards, objective, *optional)


@_op.register_fake
def _(logits, *rest):
    code = rest[12]
    terms = [code.new_empty(code.shape, dtype=torch.float32) for _ in range(4)]
    return (logits.new_empty((), dtype=torch.float32), *terms, torch.empty_like(logits))


def _save_dlogits(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[5])


def _backward(ctx, grad_loss, *_):
    (dlogits,) = ctx.saved_tensors
    return (grad_loss.to(dlogits.dtype) * dlogits, *[None] * 19)


_op.register_autograd(_backward, setup_context=_save_dlogits)


def check_tokens(
    logits: Tensor,
    tokens: RowTokens,
    code: Tensor,
    counted: Tensor,
    rewards: Tensor,
    reference: Tensor | None,
    reference_kind: str,
    old_log_prob: Tensor | None,
    answer_weight: Tensor | None,
) -> None:
    """Raise ValueError unless what concerns tokens has the shape, dtype and device that ``trie_grpo`` names."""
    answers, total = rewards.numel(), code.numel()
    if code.ndim != 2 or code.shape[1] != answers:
        raise ValueError(f"code: found shape {tuple(code.shape)}, expected [levels, {answers}]")
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    expected = {
        "reference": (reference, tuple(logits.shape), logits.dtype if reference_kind == "logits" else real),
        "tokens.start": (tokens.start, (len(logits) + 1,), torch.int32),
        "tokens.token": (tokens.token, (total,), torch.int32),
        "tokens.answer": (tokens.answer, (total,), torch.int32),
        "tokens.row": (tokens.row, (total,), torch.int32),
        "code": (code, tuple(code.shape), torch.int32),
        "counted": (counted, tuple(code.shape), torch.bool),
        "rewards": (rewards, tuple(rewards.shape), real),
        "old_log_prob": (old_log_prob, tuple(code.shape), real),
        "answer_weight": (answer_weight, (answers,), real),
    }
    check_tensors(expected, logits.device)


def eager_terms(
    logits: Tensor,
    tables: TrieTables,
    rows: TrieRows,
    tokens: RowTokens,
    code: Tensor,
    counted: Tensor,
    rewards: Tensor,
    objective: GRPOObjective,
    reference: Tensor | None = None,
    reference_kind: str = "logits",
    old_log_prob: Tensor | None = None,
    answer_weight: Tensor | None = None,
) -> GRPOTerms:
    """``trie_grpo`` by ``trie_grpo_reference`` over the dense form of the rows; any device, also float64."""
    valid, log_prior = dense_policy(tables, rows, torch.promote_types(logits.dtype, torch.float32))
    if reference is not None and reference_kind == "logits":
        reference = log_policy(reference, valid, log_prior, objective.temperature)
    answer = torch.arange(code.shape[1], device=code.device).expand_as(code)
    flat = SampledTokens(tokens.row.long(), code.flatten().long(), answer.flatten(), counted.flatten())
    old = None if old_log_prob is None else old_log_prob.flatten()
    terms = trie_grpo_reference(
        logits, valid, log_prior, flat, rewards, objective, len(code), reference, old, answer_weight
    )
    return GRPOTerms(terms.loss, *(term.view(code.shape) for term in terms.per_token))


def eager(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """What ``launch`` returns, by ``eager_terms`` and autograd."""
    leaf = logits.detach().requires_grad_()
    terms = eager_terms(leaf, *arguments)
    (dlogits,) = torch.autograd.grad(terms.loss, leaf)
    return terms.loss.detach(), *terms.per_token, dlogits


def launch(
    logits: Tensor,
    tables: TrieTables,
    rows: TrieRows,
    tokens: RowTokens,
    code: Tensor,
    counted: Tensor,
    rewards: Tensor,
    objective: GRPOObjective,
    reference: Tensor | None = None,
    reference_kind: str = "logits",
    old_log_prob: Tensor | None = None,
    answer_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log_prob, kl, entropy, clipped, dlogits) by one launch of the kernel and one sum over rows."""
    given = tokens.start, tokens.token, tokens.answer
    optional = (reference, reference_kind, old_log_prob, answer_weight)
    inputs = row_inputs(logits, tables, rows)
    return _launch(logits, inputs, tables.weight, given, code, counted, rewards, objective, *optional)


def _launch(
    logits: Tensor,
    rows: RowInputs,
    prior_weight: float,
    tokens: tuple[Tensor, Tensor, Tensor],
    code: Tensor,
    counted: Tensor,
    rewards: Tensor,
    objective: GRPOObjective,
    reference: Tensor | None,
    reference_kind: str,
    old_log_prob: Tensor | None,
    answer_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, codebook = logits.shape
    logits = logits.contiguous()
    dlogits = torch.empty_like(logits)
    loss = logits.new_empty(count, dtype=torch.float32)
    log_prob, kl, entropy, clipped = (code.new_empty(code.shape, dtype=torch.float32) for _ in range(4))
    shares = _shares_on(logits.device, rewards.shape[-1], objective.set_size) if objective.set_size > 1 else None
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
            *tokens,
            code.contiguous(),
            counted.contiguous(),
            None if old_log_prob is None else old_log_prob.contiguous(),
            rewards.contiguous(),
            answer_weight,
            shares,
            *rows,
            codebook,
            *rows.strides,
            prior_weight,
            1 / objective.temperature,
            objective.clip_low,
            objective.clip_high,
            objective.beta,
            code.shape[1],
            code.shape[0],
            **specialise(objective, reference_kind, codebook, rewards.shape[-1]),
        )
    return loss.sum(), log_prob, kl, entropy, clipped, dlogits


def specialise(objective: GRPOObjective, reference_kind: str, codebook: int, group: int) -> dict:
    """The kernel's compile-time settings: the objective's and block sizes. Nothing here varies with the batch."""
    block = row_block(codebook)
    baseline = objective.baseline
    if objective.set_size:
        baseline = "others" if objective.set_size == 1 else "set"
    return {
        "LOSS": objective.loss,
        "EXACT_KL": objective.kl == "exact",
        "REFERENCE_IS_LOGITS": reference_kind == "logits",
        "SCALE_REWARDS": objective.scale_rewards,
        "BASELINE": baseline,
        "BLOCK_T": min(max(triton.next_power_of_2(group), 16), 32),
        "GROUP": group,
        "BLOCK_G": triton.next_power_of_2(group),
        **block,
    }


@lru_cache(maxsize=8)
def _shares_on(device: torch.device, group: int, set_size: int) -> Tensor:
    return torch.tensor(set_shares(group, set_size), dtype=torch.float32, device=device)
