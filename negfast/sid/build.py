"""From an item table and a log to one semantic ID an item, with a report of how good the codes are."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from negfast.data.items import ItemTable
from negfast.data.log import EventLog
from negfast.errors import InputError
from negfast.sid.assign import assign_codes
from negfast.sid.embed import embed_items
from negfast.sid.quantize import encode, fit_rq_kmeans, reconstruction_error

METHODS = ("rq-kmeans", "random")


@dataclass(frozen=True)
class SemanticIds:
    codes: np.ndarray  # uint16 [I, L], rows distinct
    codebooks: np.ndarray  # float32 [L, K, D], NaN rows hold no centroid; D = 0 for method "random"
    embedding: np.ndarray  # float32 [I, D], blocks L2-normalised
    report: dict[str, Any]  # JSON types only


def build_semantic_ids(
    items: ItemTable,
    log: EventLog,
    valid_day: int,
    *,
    levels: int = 3,
    codebook: int = 256,
    method: str = "rq-kmeans",
    encoder: str = "auto",
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> SemanticIds:
    """Embed the items, quantise, assign one-to-one.

    The last codes of level 1 are the cold prefix: items with neither text, own embedding nor events before
    ``valid_day`` lie there in table order, and one such code is always kept for items to come. "random" gives
    every item a random leaf, as a control. Raises InputError for unknown names and for too few codes.
    """
    if method not in METHODS:
        raise InputError(f"semantic IDs: expected method {' or '.join(METHODS)}, found {method!r}")
    if levels < 1 or not 2 <= codebook <= 65_536:
        raise InputError(f"semantic IDs: expected levels >= 1 and codebook in 2..65536, found {levels} x {codebook}")
    if codebook**levels < len(items):
        raise InputError(f"semantic IDs: {levels} levels of {codebook} codes cannot name {len(items)} items apart")
    began = time.perf_counter()
    embedded = embed_items(items, log, valid_day, encoder=encoder, seed=seed, report=report)
    facts: dict[str, Any] = {
        "method": method,
        "levels": levels,
        "codebook": codebook,
        "seed": seed,
        "blocks": embedded.blocks,
        "cold_items": int(embedded.cold.sum()),
        "embed_seconds": round(time.perf_counter() - began, 2),
    }
    began = time.perf_counter()
    if method == "random":
        codes = _random_codes(len(items), levels, codebook, seed)
        codebooks = np.zeros((levels, codebook, 0), dtype=np.float32)
    else:
        codes, codebooks, quality = _quantised(embedded.vectors, embedded.cold, levels, codebook, seed)
        facts |= quality
    facts["quantize_seconds"] = round(time.perf_counter() - began, 2)
    facts["level"] = [_usage(codes[:, level], codebook) for level in range(levels)]
    facts["nodes"] = [len(np.unique(codes[:, :level], axis=0)) for level in range(1, levels + 1)]
    for line in _lines(facts):
        report(line)
    return SemanticIds(codes, codebooks, embedded.vectors, facts)


def _quantised(
    vectors: np.ndarray, cold: np.ndarray, levels: int, codebook: int, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    under_code = codebook ** (levels - 1)
    n_cold, n_warm = int(cold.sum()), int((~cold).sum())
    reserved = max(1, -(-n_cold // under_code))
    if n_warm > (codebook - reserved) * under_code:
        raise InputError(
            f"semantic IDs: {levels} levels of {codebook} codes, {reserved} of the first level kept for cold items, "
            f"cannot name {n_warm} items apart"
        )
    codes = np.empty((len(vectors), levels), dtype=np.uint16)
    codes[cold] = _digits(np.arange(n_cold) + (codebook - reserved) * under_code, levels, codebook)
    if n_warm == 0:
        codebooks = np.full((levels, codebook, vectors.shape[1]), np.nan, dtype=np.float32)
        return codes, codebooks, {}
    warm = vectors[~cold]
    codebooks = fit_rq_kmeans(warm, [codebook - reserved] + [codebook] * (levels - 1), codebook, seed)
    before, after = encode(warm, codebooks), assign_codes(warm, codebooks)
    codes[~cold] = after
    return (
        codes,
        codebooks,
        {
            "collisions_before": n_warm - len(np.unique(before, axis=0)),
            "collisions_after": n_warm - len(np.unique(after, axis=0)),
            "moved": int((before != after).any(axis=1).sum()),
            "moved_above_last_level": int((before[:, :-1] != after[:, :-1]).any(axis=1).sum()),
            "error_before": reconstruction_error(warm, before, codebooks),
            "error_after": reconstruction_error(warm, after, codebooks),
        },
    )


def _digits(number: np.ndarray, levels: int, codebook: int) -> np.ndarray:
    """Leaf numbers [N] to codes [N, L], the first level most significant."""
    places = np.array([codebook**level for level in range(levels - 1, -1, -1)], dtype=np.int64)
    return (number[:, None] // places % codebook).astype(np.uint16)


def _random_codes(n_items: int, levels: int, codebook: int, seed: int) -> np.ndarray:
    leaves = min(codebook**levels, 2**62)
    return _digits(np.random.default_rng(seed).choice(leaves, n_items, replace=False), levels, codebook)


def _usage(code: np.ndarray, codebook: int) -> dict[str, Any]:
    """Codes in use, and the perplexity exp(entropy) of the items' codes: the number of equally used codes."""
    counts = np.bincount(code, minlength=codebook)
    share = counts[counts > 0] / len(code)
    return {"used": int((counts > 0).sum()), "perplexity": round(math.exp(-(share * np.log(share)).sum()), 1)}


def _lines(facts: dict[str, Any]) -> list[str]:
    blocks = " + ".join(f"{name} {width}" for name, width in facts["blocks"].items())
    usage = ", ".join(f"{level['used']} ({level['perplexity']})" for level in facts["level"])
    lines = [
        f"semantic IDs: {facts['levels']} x {facts['codebook']} {facts['method']} of {blocks}; "
        f"codes used (perplexity) {usage}; {facts['cold_items']} cold items"
    ]
    if "collisions_before" in facts:
        lines.append(
            f"semantic IDs: collisions {facts['collisions_before']} -> {facts['collisions_after']}, {facts['moved']} "
            f"items moved, error {facts['error_before']:.4f} -> {facts['error_after']:.4f}"
        )
    return lines
