"""Residual quantisation: L levels of K centroids, each level fitted to what the levels before it leave over."""

import faiss
import numpy as np


def fit_rq_kmeans(vectors: np.ndarray, sizes: list[int], codebook: int, seed: int) -> np.ndarray:
    """Residual k-means of vectors [N, D]: codebooks, float32 [L, K, D].

    Level l gets min(``sizes[l]``, N) centroids in its first rows; rows without a centroid are NaN. Deterministic
    for a seed, a number of threads and a machine.
    """
    codebooks = np.full((len(sizes), codebook, vectors.shape[1]), np.nan, dtype=np.float32)
    residual = np.ascontiguousarray(vectors, dtype=np.float32)
    for level, size in enumerate(sizes):
        size = min(size, len(residual))
        kmeans = faiss.Kmeans(residual.shape[1], size, niter=25, seed=seed + level, min_points_per_centroid=1)
        kmeans.train(residual)
        codebooks[level, :size] = kmeans.centroids
        residual = residual - codebooks[level][nearest(residual, codebooks[level])]
    return codebooks


def centroids_of(codebook: np.ndarray) -> np.ndarray:
    """The rows of one level's codebook [K, D] that hold a centroid, [k, D]."""
    return codebook[np.isfinite(codebook).all(axis=1)]


def nearest(residual: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Nearest centroid of each row, int64 [N], the first among equals."""
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(centroids_of(codebook))
    return index.search(np.ascontiguousarray(residual), 1)[1][:, 0]


def encode(vectors: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Nearest codes level by level with frozen codebooks, uint16 [N, L]; different items may share them all."""
    codes = np.empty((len(vectors), len(codebooks)), dtype=np.uint16)
    residual = np.asarray(vectors, dtype=np.float32)
    for level, codebook in enumerate(codebooks):
        codes[:, level] = nearest(residual, codebook)
        residual = residual - codebook[codes[:, level]]
    return codes


def reconstruction_error(vectors: np.ndarray, codes: np.ndarray, codebooks: np.ndarray) -> float:
    """Squared distance to the sum of the chosen centroids, as a share of the vectors' squared length."""
    rebuilt = np.zeros(vectors.shape, dtype=np.float64)
    for level, codebook in enumerate(codebooks):
        rebuilt += codebook[codes[:, level]]
    return float(((vectors - rebuilt) ** 2).sum() / max((vectors.astype(np.float64) ** 2).sum(), 1e-30))
