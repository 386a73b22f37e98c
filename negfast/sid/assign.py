"""One semantic ID for one item: codes as near as possible under the rule that no two items share all of them."""

import math
from collections.abc import Callable

import numba
import numpy as np
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from negfast.errors import InputError
from negfast.sid.kmeans import squared_distances
from negfast.sid.quantize import BLOCK, Quantizer, left_over, nearest

LARGEST_TABLE = 1 << 24  # cells of a cost matrix that is kept; larger ones are made some rows at a time
LARGEST_EXACT = 1 << 22  # cells of a cost matrix up to which the assignment is optimal (seconds), not stable


@threadpool_limits.wrap(limits=1, user_api="blas")  # thousands of small products, for which threads only wait
def assign_codes(vectors: np.ndarray, quantizer: Quantizer, taken: np.ndarray | None = None) -> np.ndarray:
    """Distinct codes of vectors [N, D], none of them in ``taken`` uint16 [M, L]: uint16 [N, L].

    Level by level each item takes its best code; where more items meet under a node than free leaves lie below it,
    some move to a next-best code of that level. On the last level a leaf holds one item, and within a prefix the
    codes minimise the summed cost. Raises InputError if there are too few leaves.
    """
    levels = quantizer.levels
    taken = np.empty((0, len(levels)), dtype=np.uint16) if taken is None else taken
    room = [math.prod(len(centroids) for centroids, _ in levels[level + 1 :]) for level in range(len(levels))]
    width = quantizer.codebooks.shape[1]
    free = room[0] * len(levels[0][0]) - int((taken[:, 0] < len(levels[0][0])).sum())
    if len(vectors) > free:
        raise InputError(f"semantic IDs: expected at most {free} items, found {len(vectors)}")
    codes = np.empty((len(vectors), len(levels)), dtype=np.uint16)
    residual = quantizer.project(vectors)
    # nodes of the level above, numbered 0, 1, ... over both tables
    parent, parent_taken = np.zeros(len(vectors), dtype=np.int64), np.zeros(len(taken), dtype=np.int64)
    for level, (centroids, prices) in enumerate(levels):
        code = nearest(residual, centroids, prices)
        held = np.sort(parent_taken * width + taken[:, level])  # children that hold taken leaves, one entry a leaf
        for rows in _overfull(parent, code, held, width, room[level]):
            below = parent[rows[0]] * width + np.arange(len(centroids))
            capacity = room[level] - (np.searchsorted(held, below, "right") - np.searchsorted(held, below))
            code[rows] = _within_room(residual[rows], centroids, prices, capacity)
        codes[:, level] = code
        if level + 1 < len(levels):
            residual = left_over(residual, centroids, code, out=residual if level else None)
            child = np.concatenate([parent * width + code, parent_taken * width + taken[:, level]])
            parent, parent_taken = np.split(np.unique(child, return_inverse=True)[1], [len(vectors)])
    return codes


def _overfull(parent: np.ndarray, code: np.ndarray, held: np.ndarray, width: int, room: int) -> list[np.ndarray]:
    """Rows under each parent that has a child with more than ``room`` items, ``held`` ones counted; one group each."""
    children, counts = np.unique(parent * width + code, return_counts=True)
    counts += np.searchsorted(held, children, "right") - np.searchsorted(held, children)
    parents = np.unique(children[counts > room] // width)
    rows = np.flatnonzero(np.isin(parent, parents))
    rows = rows[np.argsort(parent[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(parent[rows])) + 1) if len(rows) else []


def _within_room(points: np.ndarray, centroids: np.ndarray, prices: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """A code for each of g points [g, d], at most ``capacity`` [k] points a code, at low total cost."""

    def cost_of(rows: np.ndarray | slice) -> np.ndarray:
        return squared_distances(points[rows], centroids) + prices

    if len(points) * len(centroids) > LARGEST_TABLE:
        return _stable(lambda rows: (cost_of(rows), np.arange(len(rows))), len(points), capacity)
    cost = cost_of(slice(None))
    if capacity.max() == 1 and cost.size <= LARGEST_EXACT:
        free = np.flatnonzero(capacity)
        return free[linear_sum_assignment(cost[:, free])[1]]
    return _stable(lambda rows: (cost, rows), len(points), capacity)


def _stable(
    cost_of: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], size: int, capacity: np.ndarray
) -> np.ndarray:
    """Every item proposes to its next-best code, every code keeps its nearest up to capacity (deferred acceptance).

    ``cost_of`` tells a table of costs [n, k] and the rows of some items in it; it need not keep it, as a table of a
    large catalogue fills memory.
    """
    code, cost = np.full(size, -1), np.full(size, -np.inf)
    proposing = np.arange(size)
    while len(proposing):
        for begin in range(0, len(proposing), BLOCK):
            items = proposing[begin : begin + BLOCK]
            _propose(*cost_of(items), items, code, cost)
        order = np.lexsort((cost, code))  # by code, nearest first
        ordered = code[order]
        rank = np.arange(size) - np.searchsorted(ordered, ordered)
        proposing = order[rank >= capacity[ordered]]
    return code


@numba.njit(cache=True)
def _propose(costs, rows, items, code, cost):
    """Moves ``items``, whose costs are in ``rows`` of a table, to the next code in the order of (cost, code)."""
    for row, item in zip(rows, items):  # noqa: B905
        last, best = code[item], -1
        now = costs[row, last] if last >= 0 else -np.inf  # not as it was: bits may differ
        for c in range(costs.shape[1]):
            later = costs[row, c] > now or (costs[row, c] == now and c > last)
            if later and (best < 0 or costs[row, c] < costs[row, best]):
                best = c
        code[item], cost[item] = max(best, 0), costs[row, max(best, 0)]


def assign_new(
    vectors: np.ndarray, cold: np.ndarray, quantizer: Quantizer, taken: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Codes of items that came later, by frozen codebooks: uint16 [N, L], distinct and none of ``taken`` [M, L].

    ``vectors`` [N, D] come from the embedding that the quantiser was fitted to (`negfast.sid.embed.embed_new`).
    Where ``cold`` bool [N] the next free leaf of the cold prefix is taken; codebooks of width 0 ("random") give a
    random free leaf by ``seed``. Raises InputError where no leaf is left.
    """
    levels, codebook, width = quantizer.codebooks.shape
    if width == 0:
        return random_codes(len(vectors), taken, codebook, seed)
    codes = np.empty((len(vectors), levels), dtype=np.uint16)
    if not cold.all():
        if len(quantizer.levels[0][0]) == 0:
            raise InputError("semantic IDs: found no codebooks, since all items were cold; prepare the data anew")
        codes[~cold] = assign_codes(vectors[~cold], quantizer, taken)
    held = leaf_numbers(taken[taken[:, 0] >= len(quantizer.levels[0][0])], codebook)
    first = codebook**levels - codebook ** (levels - 1)  # of the code that is always kept
    start = int(held.max()) + 1 if len(held) else first
    if start + int(cold.sum()) > codebook**levels:
        raise InputError(f"semantic IDs: the cold prefix has no room for {int(cold.sum())} more items")
    codes[cold] = digits(start + np.arange(int(cold.sum())), levels, codebook)
    return codes


def random_codes(count: int, taken: np.ndarray, codebook: int, seed: int) -> np.ndarray:
    """Distinct random codes, none of ``taken`` uint16 [M, L]: uint16 [count, L]."""
    levels = taken.shape[1]
    leaves = min(codebook**levels, 2**62)
    if count + len(taken) > leaves:
        raise InputError(f"semantic IDs: expected at most {leaves} items, found {count + len(taken)}")
    # drawing as many more as are taken leaves enough whatever is struck out; the first ones are a fair sample
    drawn = np.random.default_rng(seed).choice(leaves, count + len(taken), replace=False)
    return digits(drawn[~np.isin(drawn, leaf_numbers(taken, codebook))][:count], levels, codebook)


def digits(number: np.ndarray, levels: int, codebook: int) -> np.ndarray:
    """Leaf numbers [N] to codes uint16 [N, L], the first level most significant."""
    return (number[:, None] // _places(levels, codebook) % codebook).astype(np.uint16)


def leaf_numbers(codes: np.ndarray, codebook: int) -> np.ndarray:
    """The inverse of `digits`, int64 [N]."""
    return codes.astype(np.int64) @ _places(codes.shape[1], codebook)


def _places(levels: int, codebook: int) -> np.ndarray:
    return np.array([codebook**level for level in range(levels - 1, -1, -1)], dtype=np.int64)
