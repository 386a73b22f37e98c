"""A fitted residual quantiser: L levels of K centroids, each for what the levels before it leave over.

All quantisers share this form, so that items of any day are coded by the same few lines: `negfast.sid.kmeans` and
`negfast.sid.rqvae` only fit it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import faiss
import numpy as np

NETWORK = "network."  # what the names of a network's tensors begin with in a file
BLOCK = 1 << 16  # vectors at once: what is computed beside a catalogue's vectors stays small


@dataclass(frozen=True)
class Quantizer:
    """Codebooks and what it takes to use them.

    A residual r gets the code c of least |r - centroid_c|^2 + price_c. Prices are zero but for balanced codes, where
    they keep popular codes from taking more than their share. An RQ-VAE quantises what its encoder makes of a vector.
    """

    codebooks: np.ndarray  # float32 [L, K, d]; NaN rows, at the end of a level, hold no centroid
    prices: np.ndarray  # float32 [L, K], at least 0
    network: dict[str, np.ndarray] = field(default_factory=dict)  # RQ-VAE: encoder.0.weight, ..., decoder.1.bias

    @classmethod
    def plain(cls, codebooks: np.ndarray, network: dict[str, np.ndarray] | None = None) -> Self:
        """Without prices."""
        return cls(codebooks, np.zeros(codebooks.shape[:2], dtype=np.float32), network or {})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Self:
        """From what ``tensors`` gave; other names are left alone."""
        network = {n.removeprefix(NETWORK): t for n, t in tensors.items() if n.startswith(NETWORK)}
        plain = cls.plain(tensors["codebooks"], network)
        return cls(plain.codebooks, tensors.get("prices", plain.prices), network)

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file has to hold; prices only where there are any."""
        prices = {"prices": self.prices} if self.prices.any() else {}
        return {"codebooks": self.codebooks, **prices, **{NETWORK + n: t for n, t in self.network.items()}}

    @cached_property
    def levels(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Centroids [k, d] and prices [k] of each level, k <= K."""
        filled = np.isfinite(self.codebooks).all(axis=2)
        return [
            (table[rows], price[rows]) for table, price, rows in zip(self.codebooks, self.prices, filled, strict=True)
        ]

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors [N, D] to the space of the codebooks, float32 [N, d]."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        return _mlp(vectors, self.network, "encoder") if self.network else vectors

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """What codes [N, L] stand for, in the space of the vectors: float32 [N, D]."""
        rebuilt = np.zeros((len(codes), self.codebooks.shape[2]), dtype=np.float32)
        for level, codebook in enumerate(self.codebooks):
            rebuilt += codebook[codes[:, level]]
        return _mlp(rebuilt, self.network, "decoder") if self.network else rebuilt


def _mlp(x: np.ndarray, network: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    hidden = np.maximum(x @ network[f"{name}.0.weight"].T + network[f"{name}.0.bias"], 0)
    return hidden @ network[f"{name}.2.weight"].T + network[f"{name}.2.bias"]


def nearest(residual: np.ndarray, centroids: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """The code of least squared distance plus price for residuals [N, d], int64 [N]."""
    if priced := prices.any():  # |r - c|^2 + p is the distance to the centroid from a plane sqrt(p) away from it
        centroids = np.concatenate([centroids, np.sqrt(prices)[:, None]], axis=1)
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, dtype=np.float32))
    code = np.empty(len(residual), np.int64)
    for begin in range(0, len(residual), BLOCK):
        part = residual[begin : begin + BLOCK]
        if priced:
            part = np.concatenate([part, np.zeros((len(part), 1), dtype=np.float32)], axis=1)
        code[begin : begin + BLOCK] = index.search(np.ascontiguousarray(part), 1)[1][:, 0]
    return code


def left_over(
    residual: np.ndarray, centroids: np.ndarray, code: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """What the chosen centroids leave of residuals [N, d], float32 [N, d]; ``out`` may be ``residual``."""
    rest = np.empty_like(residual) if out is None else out
    for begin in range(0, len(residual), BLOCK):
        rows = slice(begin, begin + BLOCK)
        np.subtract(residual[rows], centroids[code[rows]], out=rest[rows])
    return rest


def encode(vectors: np.ndarray, quantizer: Quantizer) -> np.ndarray:
    """Best codes of vectors [N, D] level by level, uint16 [N, L]; different items may share them all."""
    codes = np.empty((len(vectors), len(quantizer.levels)), dtype=np.uint16)
    residual = quantizer.project(vectors)
    for level, (centroids, prices) in enumerate(quantizer.levels):
        codes[:, level] = nearest(residual, centroids, prices)
        if level + 1 < len(quantizer.levels):
            residual = left_over(residual, centroids, codes[:, level], out=residual if level else None)
    return codes
