"""What kernels over trie rows share: the row's mask and log mass rebuilt on chip, and its softmax in units of log2."""

import triton
import triton.language as tl

from negfast.kernels import dispatch

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)


@triton.jit
def load_log_mass(
    row,
    codes,
    child_bits,
    word_first,
    log_mass,
    node,
    mass_start,
    seen_begin,
    seen_end,
    seen_node,
    seen_log,
    words,
):
    """(valid, log mass) of one row over ``codes`` [BLOCK_K]; pointers as in TrieTables and TrieRows.

    A code is valid if its child exists and the row's seen entries do not prune it. Log mass is 0 without a prior.
    """
    here = tl.load(node + row)
    valid, child = load_children(here, child_bits, word_first, words, codes.shape[0])
    prior = tl.zeros(codes.shape, tl.float32)
    if log_mass is not None:
        start = tl.load(mass_start + row)
        prior = tl.load(log_mass + start + child, mask=valid, other=0.0)
    begin = tl.load(seen_begin + row)
    end = tl.load(seen_end + row)
    if begin < end:
        entry, found = find_seen(seen_node, begin, end, child, valid)
        prior = tl.load(seen_log + entry, mask=found, other=0.0) + tl.where(found, 0.0, prior)
        valid = valid & (prior > -float("inf"))
    return valid, prior


@triton.jit
def load_children(here, child_bits, word_first, words, BLOCK_K: tl.constexpr):
    """(exists [BLOCK_K], child id) of every code of a node; none where ``here`` < 0.

    A word of 32 codes is loaded once for all of them, and a child's place within it is a count of the bits below.
    """
    word = tl.arange(0, BLOCK_K // 32)
    inside = word < tl.where(here >= 0, words, 0)
    at = tl.maximum(here, 0).to(tl.int64) * words + word
    bits = tl.load(child_bits + at, mask=inside, other=0)[:, None]
    first = tl.load(word_first + at, mask=inside, other=0)[:, None]
    place = tl.arange(0, 32)[None, :]
    child = first + count_bits(bits & ((1 << place) - 1))
    exists = (bits >> place) & 1
    return tl.reshape(exists, [BLOCK_K]) != 0, tl.reshape(child, [BLOCK_K])


@triton.jit
def count_bits(x):
    """Set bits of int32. The compiler knows this idiom and makes it the hardware's instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


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
    p = exp2(scores - top)
    total = tl.sum(p, 0)
    return scores - (top + tl.log2(total)), p * (1 / total)


@triton.jit
def sampled_log_prob(log2_p, codes, sampled):
    """Natural log-probability of each code in ``sampled`` [T], from a row's log2_p [K]; -inf where not valid."""
    if sampled.shape[0] == 1:
        found = tl.zeros_like(sampled) + tl.sum(tl.where(codes == sampled, log2_p, 0.0), 0)
    else:
        found = tl.gather(log2_p, sampled, 0)
    return tl.where(found > -1e29, 0.6931471805599453 * found, -float("inf"))


@triton.jit
def exp2(x):
    """2^x with results below 2^-126 flushed to zero: one instruction, where the compiler's own spends four."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


def row_block(codebook: int) -> dict[str, int]:
    """Block, warps and registers that hold a whole row of ``codebook`` codes. Raises ValueError above 8,192."""
    if not 1 <= codebook <= 8192:
        raise ValueError(f"codebook: found {codebook}, expected 1 to 8192 codes a row")
    block = max(triton.next_power_of_2(codebook), 256)
    # without a bound on registers ptxas gives some up for occupancy, and spills
    return {"BLOCK_K": block, "num_warps": min(block // 256, 16), "maxnreg": 128}
