"""The kernel of trie_grpo.py, which has its formula, derivation, bytes and FLOPs."""

import triton
import triton.language as tl

from negfast.kernels.trie_rows_kernel import exp2, load_log_mass, log2_softmax_row, sampled_log_prob


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
    token_completion,
    code,
    counted,
    old_log_prob,
    rewards,
    shares,
    child_bits,
    word_first,
    log_mass,
    node,
    mass_start,
    seen_begin,
    seen_end,
    seen_node,
    seen_log,
    codebook,
    words,
    prior_weight,
    inverse_temperature,
    clip_low,
    clip_high,
    beta,
    completions,
    levels,
    LOSS: tl.constexpr,
    EXACT_KL: tl.constexpr,
    SCALE_REWARDS: tl.constexpr,
    BASELINE: tl.constexpr,
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
        row, codes, child_bits, word_first, log_mass, node, mass_start, seen_begin, seen_end, seen_node, seen_log,
        words,
    )  # fmt: skip
    scale = inverse_temperature / LN2
    prior *= prior_weight * scale
    log_p, p = log2_softmax_row(z * scale + prior, valid)
    row_entropy = -LN2 * tl.sum(p * log_p, 0)
    row_kl = 0.0
    log_ref = tl.zeros_like(z)
    if reference is not None:
        log_ref = tl.load(reference + first_code + codes, mask=codes < codebook, other=0.0).to(tl.float32)
        log_ref = log2_softmax_row(log_ref * scale + prior, valid)[0]
        row_kl = LN2 * tl.sum(p * (log_p - log_ref), 0)

    members = tl.arange(0, BLOCK_G)
    first_completion = tl.load(token_completion + begin)
    group_rewards = rewards + first_completion // GROUP * GROUP
    peers = tl.load(group_rewards + members, mask=members < GROUP, other=0.0)
    mean = tl.sum(peers, 0) / GROUP
    spread, share, denominator = 1.0, 0.0, 1.0
    if SCALE_REWARDS:
        deviation = tl.where(members < GROUP, peers - mean, 0.0)
        spread = tl.sqrt(tl.sum(deviation * deviation, 0) / max(GROUP - 1, 1))
    if BASELINE == "set":
        rank = rank_in_group(group_rewards, peers, members, GROUP)
        share = tl.load(shares + rank, mask=members < GROUP, other=0.0)
    if LOSS == "dapo":
        denominator = tl.maximum(count_tokens(counted, completions * levels), 1e-12)
    elif LOSS == "dr_grpo":
        denominator = completions * 1.0 * levels

    h = tl.zeros_like(z)
    row_loss = 0.0
    slope_total = 0.0
    kl_weight = 0.0
    if end - begin == 1:  # most rows: no vector of tokens, none of its sums
        row_loss, kl_weight, slope_total, h = serve_tokens(
            begin, end, codes, log_p, log_ref, row_entropy, row_kl, members, peers, mean, spread, share, denominator,
            log_prob, kl, entropy, clipped, tokens, token_completion, code, counted, old_log_prob, rewards,
            clip_low, clip_high, beta, completions, levels, reference is not None, LOSS, EXACT_KL, SCALE_REWARDS,
            BASELINE, GROUP, BLOCK_T=1,
        )  # fmt: skip
    else:
        for first in range(begin, end, BLOCK_T):
            part_loss, part_kl_weight, part_slope, part_h = serve_tokens(
                first, end, codes, log_p, log_ref, row_entropy, row_kl, members, peers, mean, spread, share,
                denominator, log_prob, kl, entropy, clipped, tokens, token_completion, code, counted, old_log_prob,
                rewards, clip_low, clip_high, beta, completions, levels, reference is not None, LOSS, EXACT_KL,
                SCALE_REWARDS, BASELINE, GROUP, BLOCK_T=BLOCK_T,
            )  # fmt: skip
            row_loss += part_loss
            slope_total += part_slope
            kl_weight += part_kl_weight
            h += part_h

    # Zero where not valid without being told: p and h are. p is made anew, to hold a vector less through the loop.
    gradient = h + exp2(log_p) * (kl_weight * (LN2 * (log_p - log_ref) - row_kl) - slope_total)
    tl.store(dlogits + first_code + codes, gradient * inverse_temperature, mask=codes < codebook)
    tl.store(loss + row, row_loss)


@triton.jit
def serve_tokens(
    first,
    end,
    codes,
    log_p,
    log_ref,
    row_entropy,
    row_kl,
    members,
    peers,
    mean,
    spread,
    share,
    denominator,
    log_prob,
    kl,
    entropy,
    clipped,
    tokens,
    token_completion,
    code,
    counted,
    old_log_prob,
    rewards,
    clip_low,
    clip_high,
    beta,
    completions,
    levels,
    HAS_REFERENCE: tl.constexpr,
    LOSS: tl.constexpr,
    EXACT_KL: tl.constexpr,
    SCALE_REWARDS: tl.constexpr,
    BASELINE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Up to BLOCK_T tokens of a row from entry ``first`` on: stores their terms and returns what they give to the row's
    loss, to the weight of the exact KL's gradient, their slopes' sum, and h [BLOCK_K], the slopes at their codes."""
    slot = tl.arange(0, BLOCK_T)
    live = slot < end - first
    token = tl.load(tokens + first + slot, mask=live, other=0)
    on = tl.load(counted + token, mask=live, other=0) != 0
    completion = tl.load(token_completion + first + slot, mask=live, other=0)
    sampled = tl.load(code + token, mask=on, other=0)
    lp = tl.where(on, sampled_log_prob(log_p, codes, sampled), 0.0)

    reward = tl.load(rewards + completion, mask=on, other=0.0)
    if BASELINE == "set":
        lead = reward[:, None] - peers[None, :]
        advantage = tl.sum(tl.where((lead > 0) & (members < GROUP)[None, :], lead * share[None, :], 0.0), 1)
    elif BASELINE == "others":
        advantage = reward - (mean * GROUP - reward) / max(GROUP - 1, 1)
    elif SCALE_REWARDS:
        advantage = (reward - mean) / (spread + 1e-4)
    else:
        advantage = reward - mean

    w = tl.where(on, 1.0, 0.0)
    if LOSS == "grpo":
        w /= tl.maximum(completion_length(counted, completion, on, completions, levels), 1.0) * (completions * 1.0)
    else:
        w /= denominator

    ratio = tl.full((BLOCK_T,), 1.0, tl.float32)
    if old_log_prob is not None:
        ratio = tl.exp(lp - tl.load(old_log_prob + token, mask=on, other=0.0))
    bounded = tl.minimum(tl.maximum(ratio, 1 - clip_low), 1 + clip_high)
    is_clipped = on & (bounded * advantage < ratio * advantage)
    slope = tl.where(is_clipped, 0.0, -w * ratio * advantage)
    token_kl = tl.where(on, row_kl, 0.0)
    kl_weight = 0.0
    if HAS_REFERENCE:
        if EXACT_KL:
            kl_weight = beta * tl.sum(w, 0)
        else:
            d = tl.where(on, sampled_log_prob(log_ref, codes, sampled) - lp, 0.0)
            token_kl = tl.exp(d) - d - 1
            slope += w * beta * (1 - tl.exp(d))
    part_loss = tl.sum(w * (beta * token_kl - tl.minimum(ratio * advantage, bounded * advantage)), 0)
    h = tl.zeros_like(log_p)
    if BLOCK_T == 1:
        h += tl.where(codes == sampled, slope, 0.0)
    else:
        for other in range(0, tl.minimum(end - first, BLOCK_T)):
            its_code = tl.load(code + tl.load(tokens + first + other))
            h += tl.where(codes == its_code, tl.sum(tl.where(slot == other, slope, 0.0), 0), 0.0)

    tl.store(log_prob + token, lp, mask=live)
    tl.store(kl + token, token_kl, mask=live)
    tl.store(entropy + token, tl.where(on, row_entropy, 0.0), mask=live)
    tl.store(clipped + token, is_clipped.to(tl.float32), mask=live)
    return part_loss, kl_weight, tl.sum(slope, 0), h


@triton.jit
def rank_in_group(first, peers, members, GROUP: tl.constexpr):
    """Rank of each reward within its group, ascending, ties by position: int32 [BLOCK_G]."""
    rank = tl.zeros(peers.shape, tl.int32)
    for other in range(0, GROUP):
        value = tl.load(first + other)
        rank += ((value < peers) | ((value == peers) & (other < members))).to(tl.int32)
    return rank


@triton.jit
def count_tokens(counted, length):
    """Counted tokens of all completions, float32."""
    total = 0.0
    for first in range(0, length, 1024):
        at = first + tl.arange(0, 1024)
        on = tl.load(counted + at, mask=at < length, other=0) != 0
        total += tl.sum(on.to(tl.float32), 0)
    return total


@triton.jit
def completion_length(counted, completion, on, completions, levels):
    """Counted tokens of each completion, float32."""
    length = tl.zeros(completion.shape, tl.float32)
    for level in range(0, levels):
        length += (tl.load(counted + level * completions + completion, mask=on, other=0) != 0).to(tl.float32)
    return length
