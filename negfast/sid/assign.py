"""One semantic ID for one item: codes as near as possible under the rule that no two items share all of them."""

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from negfast.errors import InputError
from negfast.sid.quantize import centroids_of, nearest

LARGEST_EXACT = 1 << 22  # cells of a cost matrix up to which the assignment is optimal (seconds), not stable


def assign_codes(vectors: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Distinct codes of vectors [N, D] under codebooks [L, K, D], uint16 [N, L].

    Level by level each item takes its nearest centroid; where more items meet under a node than leaves fit below
    it, some move to a next-best code of that level. On the last level a leaf holds one item, and within a prefix
    the codes minimise the summed squared distance. Raises InputError if there are too few leaves.
    """
    centroids = [centroids_of(codebook) for codebook in codebooks]
    room = [math.prod(len(c) for c in centroids[level + 1 :]) for level in range(len(centroids))]
    if len(vectors) > room[0] * len(centroids[0]):
        raise InputError(f"semantic IDs: expected at most {room[0] * len(centroids[0])} items, found {len(vectors)}")
    codes = np.empty((len(vectors), len(centroids)), dtype=np.uint16)
    residual = np.asarray(vectors, dtype=np.float32)
    parent = np.zeros(len(vectors), dtype=np.int64)  # node of the level above, numbered 0, 1, ...
    for level, table in enumerate(centroids):
        code = nearest(residual, codebooks[level])
        for rows in _overfull(parent, code, len(table), room[level]):
            code[rows] = _within_room(_distances(residual[rows], table), room[level])
        codes[:, level] = code
        residual = residual - table[code]
        parent = np.unique(parent * len(table) + code, return_inverse=True)[1]
    return codes


def _overfull(parent: np.ndarray, code: np.ndarray, n_codes: int, room: int) -> list[np.ndarray]:
    """Rows under each parent that has a child with more than ``room`` items, a group a parent."""
    children, counts = np.unique(parent * n_codes + code, return_counts=True)
    parents = np.unique(children[counts > room] // n_codes)
    rows = np.flatnonzero(np.isin(parent, parents))
    rows = rows[np.argsort(parent[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(parent[rows])) + 1) if len(rows) else []


def _distances(residual: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Squared distances, float64 [g, k]."""
    x, y = residual.astype(np.float64), table.astype(np.float64)
    return (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)


def _within_room(cost: np.ndarray, room: int) -> np.ndarray:
    """A code for each of g items, at most ``room`` items a code, at low total cost [g, k]."""
    if room == 1 and cost.size <= LARGEST_EXACT:
        return linear_sum_assignment(cost)[1]
    return _stable(cost, room)


def _stable(cost: np.ndarray, room: int) -> np.ndarray:
    """Every item proposes to its next-best code, every code keeps its ``room`` nearest (deferred acceptance)."""
    preference = np.argsort(cost, axis=1, kind="stable")
    choice = np.zeros(len(cost), dtype=np.int64)  # position in the preference list
    while True:
        code = preference[np.arange(len(cost)), choice]
        order = np.lexsort((cost[np.arange(len(cost)), code], code))  # by code, nearest first
        ordered = code[order]
        rank = np.arange(len(cost)) - np.searchsorted(ordered, ordered)
        refused = order[rank >= room]
        if len(refused) == 0:
            return code
        choice[refused] += 1
