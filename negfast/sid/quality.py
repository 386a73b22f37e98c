"""How good a table of semantic IDs is, before any model is trained on it."""

import math
from typing import Any

import faiss
import numpy as np

from negfast.sid.assign import leaf_numbers
from negfast.sid.quantize import BLOCK, Quantizer, encode

NEIGHBOURS = 10
ASKED = 2_000  # items whose neighbours are looked up; all, where there are fewer


def usage(codes: np.ndarray, codebook: int) -> list[dict[str, Any]]:
    """Of each level the codes in use, and the perplexity exp(entropy): the number of equally used codes."""
    levels = []
    for code in codes.T:
        counts = np.bincount(code, minlength=codebook)
        share = counts[counts > 0] / len(code)
        levels.append(
            {"used": int((counts > 0).sum()), "perplexity": round(math.exp(-(share * np.log(share)).sum()), 1)}
        )
    return levels


def quantisation(vectors: np.ndarray, codes: np.ndarray, quantizer: Quantizer) -> dict[str, Any]:
    """What the quantiser alone says of ``vectors`` [N, D] ("before") against their distinct ``codes`` ("after").

    A collision is an item without a code of its own: N minus the number of distinct codes.
    """
    before, codebook = encode(vectors, quantizer), quantizer.codebooks.shape[1]
    return {
        "collisions_before": len(codes) - len(np.unique(leaf_numbers(before, codebook))),
        "collisions_after": len(codes) - len(np.unique(leaf_numbers(codes, codebook))),
        "moved": int((before != codes).any(axis=1).sum()),
        "moved_above_last_level": int((before[:, :-1] != codes[:, :-1]).any(axis=1).sum()),
        "error_before": reconstruction_error(vectors, before, quantizer),
        "error_after": reconstruction_error(vectors, codes, quantizer),
    }


def reconstruction_error(vectors: np.ndarray, codes: np.ndarray, quantizer: Quantizer) -> float:
    """Squared distance to what the codes stand for, as a share of the vectors' squared length."""
    missed = length = 0.0
    for begin in range(0, len(vectors), BLOCK):
        part = vectors[begin : begin + BLOCK].astype(np.float64)
        length += (part**2).sum()
        part -= quantizer.reconstruct(codes[begin : begin + BLOCK])
        part *= part
        missed += part.sum()
    return float(missed / max(length, 1e-30))


def neighbour_overlap(vectors: np.ndarray, codes: np.ndarray, seed: int = 0) -> list[float]:
    """The share of an item's ``NEIGHBOURS`` nearest items by cosine that share its first 1, 2, ... L - 1 codes.

    Mean over a seeded sample of ``ASKED`` items; items with a zero vector are neither asked nor found. Empty where
    there are too few items.
    """
    placed = np.flatnonzero(vectors.any(axis=1))
    if len(placed) <= NEIGHBOURS:
        return []
    unit = np.ascontiguousarray(vectors[placed], dtype=np.float32)
    faiss.normalize_L2(unit)
    asked = np.random.default_rng(seed).permutation(len(placed))[:ASKED]
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    found = index.search(unit[asked], NEIGHBOURS + 1)[1]
    others = found != asked[:, None]
    others &= np.cumsum(others, axis=1) <= NEIGHBOURS  # of twins the item itself may not be among those found
    same = codes[placed[found]] == codes[placed[asked]][:, None]
    shared = np.logical_and.accumulate(same, axis=2)[:, :, :-1]
    return [round(float(share), 4) for share in shared[others].mean(axis=0)]
