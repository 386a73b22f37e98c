"""The kernel of sid_cross_entropy.py, which has its formula, bytes and FLOPs."""

import triton
import triton.language as tl

from negfast.kernels.trie_rows_kernel import load_log_mass, log2_softmax_row, sampled_log_prob


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
    mass_start,
    seen_begin,
    seen_end,
    seen_node,
    seen_log,
    codebook,
    words,
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
        row, codes, child_bits, word_first, log_mass, node, mass_start, seen_begin, seen_end, seen_node, seen_log,
        words,
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
