"""What kernels over trie rows share: the row's mask and log mass rebuilt on chip, and its softmax in units of log2."""

import triton
import triton.language as tl


@triton.jit
def load_log_mass(
    row,
    codes,
    first_child,
    child_bits,
    log_mass,
    node,
    mass_row,
    seen_begin,
    seen_end,
    seen_node,
    seen_log,
    words,
    nodes,
):
    """(valid, log mass) of one row over ``codes`` [BLOCK_K]; pointers as in TrieTables and TrieRows.

    A code is valid if its child exists and the row's seen entries do not prune it. Log mass is 0 without a prior.
    """
    here = tl.load(node + row)
    inside = codes // 32 < tl.where(here >= 0, words, 0)
    here = tl.maximum(here, 0).to(tl.int64)
    word = tl.load(child_bits + here * words + codes // 32, mask=inside, other=0)
    bit = word >> (codes % 32) & 1
    valid = bit != 0
    child = tl.load(first_child + here) - 1 + tl.cumsum(bit, 0)
    prior = tl.zeros(codes.shape, tl.float32)
    if log_mass is not None:
        day = tl.load(mass_row + row).to(tl.int64)
        prior = tl.load(log_mass + day * nodes + child, mask=valid, other=0.0)
    begin = tl.load(seen_begin + row)
    end = tl.load(seen_end + row)
    if begin < end:
        entry, found = find_seen(seen_node, begin, end, child, valid)
        prior = tl.load(seen_log + entry, mask=found, other=0.0) + tl.where(found, 0.0, prior)
        valid = valid & (prior > -float("inf"))
    return valid, prior


@triton.jit
def find_seen(seen_node, begin, end, child, exists):
    """Binary search of each child among seen_node[begin:end], ascending; (entry, found)."""
    low = tl.zeros_like(child) + begin
    high = tl.zeros_like(child) + end
    span = end - begin
    while span > 0:
        middle = (low + high) // 2
        searching = exists & (low < high)
        smaller = tl.load(seen_node + middle, mask=searching, other=0) < child
        low = tl.where(searching & smaller, middle + 1, low)
        high = tl.where(searching & (smaller == 0), middle, high)
        span = span // 2
    inside = exists & (low < end)
    found = inside & (tl.load(seen_node + low, mask=inside, other=-1) == child)
    return low, found


@triton.jit
def log2_softmax_row(scores, valid):
    """(log2 p, p) of one row of scores in units of log2, over its valid codes: -1e30 and 0 where not valid.

    A finite number instead of -inf, so that 0 * log 0 needs no care. A row without a valid code is uniform; no token
    that counts is sampled there.
    """
    scores = tl.where(valid, scores, -1e30)
    top = tl.max(scores, 0)
    p = tl.exp2(scores - top)
    total = tl.sum(p, 0)
    return scores - (top + tl.log2(total)), p * (1 / total)


@triton.jit
def sampled_log_prob(log2_p, sampled):
    """Natural log-probability of each code in ``sampled``, gathered from a row's log2_p; -inf where not valid."""
    found = tl.gather(log2_p, sampled, 0)
    return tl.where(found > -1e29, 0.6931471805599453 * found, -float("inf"))


def row_block(codebook: int) -> dict[str, int]:
    """Block, warps and registers that hold a whole row of ``codebook`` codes. Raises ValueError above 8,192."""
    if not 1 <= codebook <= 8192:
        raise ValueError(f"codebook: found {codebook}, expected 1 to 8192 codes a row")
    block = max(triton.next_power_of_2(codebook), 256)
    # without a bound on registers ptxas gives some up for occupancy, and spills
    return {"BLOCK_K": block, "num_warps": min(block // 256, 16), "maxnreg": 128}
