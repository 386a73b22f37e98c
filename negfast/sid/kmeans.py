"""Residual k-means, plain and balanced: each level is fitted to what the levels before it leave over."""

import faiss
import numpy as np
import scipy.sparse as sp

from negfast.sid.quantize import Quantizer, left_over, nearest

POINTS_PER_CENTROID = 256  # more are not looked at when fitting, by faiss and by the balanced rounds
FITTED_ROWS = 1 << 18  # vectors that codebooks are fitted to, at most: 4 times what 256 centroids look at
BALANCED_ROUNDS = 10  # of prices and centroids in turn
SINKHORN_STEPS = 40  # a round; prices go on from those of the round before
TINY = 1e-300  # float64: the prices of far clumps need exponents that float32 does not have
SHARPNESS = 0.05  # entropic regularisation as a share of the mean distance to the nearest centroid


def fit_rq_kmeans(vectors: np.ndarray, sizes: list[int], codebook: int, seed: int) -> Quantizer:
    """Residual k-means of vectors [N, D].

    Level l gets min(``sizes[l]``, N) centroids in its first rows; of more than FITTED_ROWS vectors a sample by ``seed``
    is looked at. Deterministic for a seed, a number of threads and a
    machine.
    """
    return _fit(vectors, sizes, codebook, seed, balanced=False)


def fit_balanced(vectors: np.ndarray, sizes: list[int], codebook: int, seed: int) -> Quantizer:
    """Residual k-means in which the codes of a level name about equally many items.

    In turn, Sinkhorn prices make the soft assignment of items to centroids balanced, and centroids move to the mean
    of the items that then choose them (balanced k-means by optimal transport; its constants are negfast's choice).
    """
    return _fit(vectors, sizes, codebook, seed, balanced=True)


def _fit(vectors: np.ndarray, sizes: list[int], codebook: int, seed: int, balanced: bool) -> Quantizer:
    codebooks = np.full((len(sizes), codebook, vectors.shape[1]), np.nan, dtype=np.float32)
    prices = np.zeros((len(sizes), codebook), dtype=np.float32)
    if len(vectors) > FITTED_ROWS:
        vectors = vectors[np.sort(np.random.default_rng(seed).permutation(len(vectors))[:FITTED_ROWS])]
    residual = np.ascontiguousarray(vectors, dtype=np.float32)
    for level, size in enumerate(sizes):
        size = min(size, len(residual))
        kmeans = faiss.Kmeans(
            residual.shape[1],
            size,
            niter=25,
            seed=seed + level,
            min_points_per_centroid=1,
            max_points_per_centroid=POINTS_PER_CENTROID,
        )
        kmeans.train(residual)
        centroids, price = np.asarray(kmeans.centroids), prices[level, :size]
        if balanced:
            rows = np.random.default_rng([seed, level]).permutation(len(residual))[: POINTS_PER_CENTROID * size]
            centroids, price = balance(residual[rows], centroids)
        codebooks[level, :size], prices[level, :size] = centroids, price
        if level + 1 < len(sizes):
            residual = left_over(residual, centroids, nearest(residual, centroids, price))
    return Quantizer(codebooks, prices)


def balance(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroids [k, d] and prices [k] under which points [n, d] choose each of them about equally often."""
    share = np.ones(len(centroids))  # exp(-price / eps): what each code takes of the mass it could
    cost = squared_distances(points, centroids)
    eps = float(SHARPNESS * cost.min(axis=1).mean() + 1e-12)
    for _ in range(BALANCED_ROUNDS):
        share = _sinkhorn(cost, share, eps)
        code = (cost - eps * np.log(share)).argmin(axis=1)
        counts = np.bincount(code, minlength=len(centroids))[:, None]
        member = sp.csr_matrix((np.ones(len(code), np.float32), (code, np.arange(len(code)))), (len(counts), len(code)))
        centroids = np.where(counts > 0, member @ points / counts.clip(1), centroids).astype(np.float32)
        cost = squared_distances(points, centroids)
    return centroids, -eps * np.log(_sinkhorn(cost, share, eps))


def _sinkhorn(cost: np.ndarray, share: np.ndarray, eps: float) -> np.ndarray:
    """Shares [k], the largest 1, that balance the soft assignment of cost [n, k]; iterations start from ``share``."""
    kernel = np.exp((cost.min(axis=1, keepdims=True) - cost) / eps)
    for _ in range(SINKHORN_STEPS):
        share = 1 / ((1 / (kernel @ share).clip(TINY)) @ kernel).clip(TINY)
        share = (share / share.max()).clip(TINY)
    return share


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """float64 [n, k]."""
    x, y = points.astype(np.float64), centroids.astype(np.float64)
    return (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)
