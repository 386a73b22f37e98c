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

Bytes: logits, reference and dlogits are touched once, 3 R K elements (6 R K bytes in bf16), plus K / 8 bytes of child
bits a row, 4 bytes a row and child, 29 bytes a token; a row of forced tokens only writes its zeros. FLOPs: about 25 a
code. The sm_90 code issues about 90 instructions a code, so wide bf16 rows wait for instructions somewhat longer than
for memory (float32 rows do not), and below about 1,000 rows of 256 the launch is all. The loss "dapo" reads all T
counted flags in every row, max@k makes G^2 comparisons a row.
"""

import inspect
import json
from dataclasses import asdict
from functools import lru_cache

import torch
import triton
import triton.language as tl
from negfast.kernels.dispatch import check_tensors, runs_triton
from negfast.kernels.trie_grpo import (
    GRPOObjective,
    GRPOTerms,
    SampledTokens,
    log_policy,
    set_shares,
    trie_grpo_reference,
)
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
    arguments = (logits, tables, rows, tokens, code, counted, rewards, objective)
    optional = (reference if objective.beta > 0 else None, reference_kind, old_log_prob, answer_weight)
    check_arguments(*arguments, *optional)
    if not runs_triton(logits.device):
        return eager_terms(*arguments, *optional)
    config = json.dumps(
        {
            "objective": asdict(objective),
            "reference_kind": reference_kind,
            "level_base": tables.level_base,
            "weight": tables.weight,
        }
    )
    loss, log_prob, kl, entropy, clipped, _ = _op(
        logits,
        reference if objective.beta > 0 else None,
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
        counted,
        rewards,
        old_log_prob,
        answer_weight,
        config,
    )
    return GRPOTerms(loss, log_prob, kl, entropy, clipped)


@torch.library.custom_op("negfast::trie_grpo", mutates_args=())
def _op(
    logits: Tensor,
    reference: Tensor | None,
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
    counted: Tensor,
    rewards: Tensor,
    old_log_prob: Tensor | None,
    answer_weight: Tensor | None,
    config: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log_prob, kl, entropy, clipped, dlogits); a custom operator takes no objects, so the settings are JSON."""
    settings = json.loads(config)
    tables = TrieTables(
        first_child=first_child,
        child_bits=child_bits,
        leaf_count=leaf_count,
        level_base=tuple(settings["level_base"]),
        codebook=logits.shape[1],
        log_mass=log_mass,
        weight=settings["weight"],
    )
    rows = TrieRows(node, seen_begin, seen_end, seen_node, seen_log, mass_row)
    tokens = RowTokens(token_start, token, token_answer, token_row)
    objective = GRPOObjective(**settings["objective"])
    arguments = (logits, tables, rows, tokens, code, counted, rewards, objective)
    return launch(*arguments, reference, settings["reference_kind"], old_log_prob, answer_weight)


OPERATOR_INPUTS = tuple(inspect.signature(_op._init_fn).parameters)


@_op.register_fake
def _(*arguments):
    given = dict(zip(OPERATOR_INPUTS, arguments, strict=True))
    logits, code = given["logits"], given["code"]
    terms = [code.new_empty(code.shape, dtype=torch.float32) for _ in range(4)]
    return (logits.new_empty((), dtype=torch.float32), *terms, torch.empty_like(logits))


def _save_dlogits(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[5])


def _backward(ctx, grad_loss, *_):
    (dlogits,) = ctx.saved_tensors
    return (grad_loss.to(dlogits.dtype) * dlogits, *[None] * (len(OPERATOR_INPUTS) - 1))


_op.register_autograd(_backward, setup_context=_save_dlogits)


def check_arguments(
    logits: Tensor,
    tables: TrieTables,
    rows: TrieRows,
    tokens: RowTokens,
    code: Tensor,
    counted: Tensor,
    rewards: Tensor,
    objective: GRPOObjective,
    reference: Tensor | None,
    reference_kind: str,
    old_log_prob: Tensor | None,
    answer_weight: Tensor | None,
) -> None:
    """Raise ValueError unless every tensor has the shape, dtype and device that ``trie_grpo`` names."""
    count, codebook = logits.shape
    answers, total = rewards.numel(), code.numel()
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if runs_triton(logits.device):
        row_block(codebook)
        if logits.dtype not in floats:
            raise ValueError(f"logits: found {logits.dtype}, expected float32, bfloat16 or float16")
    if code.ndim != 2 or code.shape[1] != answers:
        raise ValueError(f"code: found shape {tuple(code.shape)}, expected [levels, {answers}]")
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    entries = (len(rows.seen_node),)
    expected = {
        "reference": (reference, (count, codebook), logits.dtype if reference_kind == "logits" else real),
        "child_bits": (tables.child_bits, (len(tables.first_child) - 1, -(-codebook // 32)), torch.int32),
        "node": (rows.node, (count,), torch.int32),
        "mass_row": (rows.mass_row, (count,), torch.int32),
        "seen_begin": (rows.seen_begin, (count,), torch.int32),
        "seen_end": (rows.seen_end, (count,), torch.int32),
        "seen_log": (rows.seen_log, entries, torch.float32),
        "tokens.start": (tokens.start, (count + 1,), torch.int32),
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
    if tables.log_mass is not None and rows.mass_row is None:
        raise ValueError("mass_row: found None, expected a tensor since the tables hold a prior")


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
    per_token = (terms.log_prob, terms.kl, terms.entropy, terms.clipped)
    return GRPOTerms(terms.loss, *(term.view(code.shape) for term in per_token))


def eager(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """What ``launch`` returns, by ``eager_terms`` and autograd."""
    leaf = logits.detach().requires_grad_()
    terms = eager_terms(leaf, *arguments)
    (dlogits,) = torch.autograd.grad(terms.loss, leaf)
    return terms.loss.detach(), terms.log_prob, terms.kl, terms.entropy, terms.clipped, dlogits


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
            tokens.start,
            tokens.token,
            tokens.answer,
            code.contiguous(),
            counted.contiguous(),
            None if old_log_prob is None else old_log_prob.contiguous(),
            rewards.contiguous(),
            answer_weight,
            shares,
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
    return {
        "LOSS": objective.loss,
        "EXACT_KL": objective.kl == "exact",
        "REFERENCE_IS_LOGITS": reference_kind == "logits",
        "SCALE_REWARDS": objective.scale_rewards,
        "SET_SIZE": objective.set_size if objective.set_size < 2 else 2,
        "BLOCK_T": min(max(triton.next_power_of_2(group), 16), 32),
        "GROUP": group,
        "BLOCK_G": triton.next_power_of_2(group),
        **block,
    }


@lru_cache(maxsize=8)
def _shares_on(device: torch.device, group: int, set_size: int) -> Tensor:
    return torch.tensor(set_shares(group, set_size), dtype=torch.float32, device=device)


@triton.jit
def trie_grpo_kernel(
    logits,
    reference,
    dlogits,
    loss,
    log_prob,
    kl,
    entropy,
    clipped,
    token_start,
    tokens,
    token_answer,
    code,
    counted,
    old_log_prob,
    rewards,
    answer_weight,
    shares,
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
    inverse_temperature,
    clip_low,
    clip_high,
    beta,
    answers,
    levels,
    LOSS: tl.constexpr,
    EXACT_KL: tl.constexpr,
    REFERENCE_IS_LOGITS: tl.constexpr,
    SCALE_REWARDS: tl.constexpr,
    SET_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Scores are kept in units of log2 (one multiplication less a code, exp2 and log2 are instructions); LN2 turns
    # what leaves a row into natural logarithms.
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0)
    codes = tl.arange(0, BLOCK_K)
    first_code = row.to(tl.int64) * codebook
    begin = tl.load(token_start + row)
    end = tl.load(token_start + row + 1)
    first_token = tl.load(tokens + begin, mask=begin < end, other=0)
    if tl.load(counted + first_token, mask=begin < end, other=0) == 0:  # forced or padding: nothing counts here
        tl.store(dlogits + first_code + codes, tl.zeros([BLOCK_K], dlogits.dtype.element_ty), mask=codes < codebook)
        tl.store(loss + row, 0.0)
        for first in range(begin, end, BLOCK_T):
            live = tl.arange(0, BLOCK_T) < end - first
            token = tl.load(tokens + first + tl.arange(0, BLOCK_T), mask=live, other=0)
            nothing = tl.zeros([BLOCK_T], tl.float32)
            tl.store(log_prob + token, nothing, mask=live)
            tl.store(kl + token, nothing, mask=live)
            tl.store(entropy + token, nothing, mask=live)
            tl.store(clipped + token, nothing, mask=live)
        return
    z = tl.load(logits + first_code + codes, mask=codes < codebook, other=0.0).to(tl.float32)
    valid, prior = load_log_mass(
        row, codes, first_child, child_bits, log_mass, node, mass_row, seen_begin, seen_end, seen_node, seen_log,
        words, nodes,
    )  # fmt: skip
    scale = inverse_temperature / LN2
    prior *= prior_weight * scale
    log_p, p = log2_softmax_row(z * scale + prior, valid)
    row_entropy = -LN2 * tl.sum(p * log_p, 0)
    row_kl = 0.0
    log_ref = tl.zeros_like(z)
    if reference is not None:
        log_ref = tl.load(reference + first_code + codes, mask=codes < codebook, other=0.0).to(tl.float32)
        if REFERENCE_IS_LOGITS:
            log_ref = log2_softmax_row(log_ref * scale + prior, valid)[0]
        else:
            log_ref = tl.where(valid, log_ref / LN2, -1e30)
        row_kl = LN2 * tl.sum(p * (log_p - log_ref), 0)

    members = tl.arange(0, BLOCK_G)
    first_answer = tl.load(token_answer + begin)
    group_rewards = rewards + first_answer // GROUP * GROUP
    peers = tl.load(group_rewards + members, mask=members < GROUP, other=0.0)
    mean = tl.sum(peers, 0) / GROUP
    if SCALE_REWARDS:
        deviation = tl.where(members < GROUP, peers - mean, 0.0)
        spread = tl.sqrt(tl.sum(deviation * deviation, 0) / max(GROUP - 1, 1))
    if SET_SIZE > 1:
        rank = rank_in_group(group_rewards, peers, members, GROUP)
        share = tl.load(shares + rank, mask=members < GROUP, other=0.0)
    weights_total = answers * 1.0
    if answer_weight is not None:
        weights_total = sum_of(answer_weight, answers)
    if LOSS == "dapo":
        denominator = tl.maximum(sum_counted(counted, answer_weight, answers, levels), 1e-12)
    elif LOSS == "dr_grpo":
        denominator = weights_total * levels

    row_loss = 0.0
    slope_total = 0.0
    kl_weight = 0.0
    h = tl.zeros_like(z)
    for first in range(begin, end, BLOCK_T):
        slot = tl.arange(0, BLOCK_T)
        live = slot < end - first
        token = tl.load(tokens + first + slot, mask=live, other=0)
        on = tl.load(counted + token, mask=live, other=0) != 0
        answer = tl.load(token_answer + first + slot, mask=live, other=0)
        sampled = tl.load(code + token, mask=on, other=0)
        lp = tl.where(on, sampled_log_prob(log_p, sampled), 0.0)

        reward = tl.load(rewards + answer, mask=on, other=0.0)
        if SET_SIZE > 1:
            lead = reward[:, None] - peers[None, :]
            advantage = tl.sum(tl.where((lead > 0) & (members < GROUP)[None, :], lead * share[None, :], 0.0), 1)
        elif SET_SIZE == 1:
            advantage = reward - (mean * GROUP - reward) / max(GROUP - 1, 1)
        elif SCALE_REWARDS:
            advantage = (reward - mean) / (spread + 1e-4)
        else:
            advantage = reward - mean

        w = tl.where(on, 1.0, 0.0)
        if answer_weight is not None:
            w *= tl.load(answer_weight + answer, mask=on, other=0.0)
        if LOSS == "grpo":
            w /= tl.maximum(answer_length(counted, answer, on, answers, levels), 1.0) * weights_total
        else:
            w /= denominator

        ratio = tl.full((BLOCK_T,), 1.0, tl.float32)
        if old_log_prob is not None:
            ratio = tl.exp(lp - tl.load(old_log_prob + token, mask=on, other=0.0))
        bounded = tl.minimum(tl.maximum(ratio, 1 - clip_low), 1 + clip_high)
        is_clipped = on & (bounded * advantage < ratio * advantage)
        slope = tl.where(is_clipped, 0.0, -w * ratio * advantage)
        token_kl = tl.where(on, row_kl, 0.0)
        if reference is not None:
            if EXACT_KL:
                kl_weight += beta * tl.sum(w, 0)
            else:
                d = tl.where(on, sampled_log_prob(log_ref, sampled) - lp, 0.0)
                token_kl = tl.exp(d) - d - 1
                slope += w * beta * (1 - tl.exp(d))
        row_loss += tl.sum(w * (beta * token_kl - tl.minimum(ratio * advantage, bounded * advantage)), 0)
        slope_total += tl.sum(slope, 0)
        for other in range(0, tl.minimum(end - first, BLOCK_T)):
            its_code = tl.load(code + tl.load(tokens + first + other))
            h += tl.where(codes == its_code, tl.sum(tl.where(slot == other, slope, 0.0), 0), 0.0)

        tl.store(log_prob + token, lp, mask=live)
        tl.store(kl + token, token_kl, mask=live)
        tl.store(entropy + token, tl.where(on, row_entropy, 0.0), mask=live)
        tl.store(clipped + token, is_clipped.to(tl.float32), mask=live)

    # Zero where not valid without being told: p and h are. p is made anew, to hold a vector less through the loop.
    gradient = h + tl.exp2(log_p) * (kl_weight * (LN2 * (log_p - log_ref) - row_kl) - slope_total)
    tl.store(dlogits + first_code + codes, gradient * inverse_temperature, mask=codes < codebook)
    tl.store(loss + row, row_loss)


@triton.jit
def rank_in_group(first, peers, members, GROUP: tl.constexpr):
    """Rank of each reward within its group, ascending, ties by position: int32 [BLOCK_G]."""
    rank = tl.zeros(peers.shape, tl.int32)
    for other in range(0, GROUP):
        value = tl.load(first + other)
        rank += ((value < peers) | ((value == peers) & (other < members))).to(tl.int32)
    return rank


@triton.jit
def sum_of(values, length):
    total = 0.0
    for first in range(0, length, 1024):
        at = first + tl.arange(0, 1024)
        total += tl.sum(tl.load(values + at, mask=at < length, other=0.0), 0)
    return total


@triton.jit
def sum_counted(counted, answer_weight, answers, levels):
    """Sum of the answer weights of all counted tokens."""
    total = 0.0
    length = answers * levels
    for first in range(0, length, 1024):
        at = first + tl.arange(0, 1024)
        on = tl.load(counted + at, mask=at < length, other=0) != 0
        if answer_weight is None:
            total += tl.sum(on.to(tl.float32), 0)
        else:
            total += tl.sum(tl.load(answer_weight + at % answers, mask=on, other=0.0), 0)
    return total


@triton.jit
def answer_length(counted, answer, on, answers, levels):
    """Counted tokens of each answer, float32."""
    length = tl.zeros(answer.shape, tl.float32)
    for level in range(0, levels):
        length += (tl.load(counted + level * answers + answer, mask=on, other=0) != 0).to(tl.float32)
    return length
