"""From an item table and a log to one semantic ID an item, with a report of how good the codes are."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from negfast.config import QUANTIZERS
from negfast.data.items import ItemTable
from negfast.data.log import EventLog
from negfast.errors import InputError
from negfast.sid.assign import assign_codes, digits, leaf_numbers, random_codes
from negfast.sid.embed import ItemEmbedding, embed_items
from negfast.sid.kmeans import fit_balanced, fit_rq_kmeans
from negfast.sid.quality import neighbour_overlap, quantisation, usage
from negfast.sid.quantize import Quantizer

LEAST_LEVELS, LEAST_CODES, MOST_CODES = 3, 256, 65_536
ROOM = 8  # names an item, at least: in a tree that is nearly full many items get no name near them


@dataclass(frozen=True)
class SemanticIds:
    codes: np.ndarray  # uint16 [I, L], rows distinct
    quantizer: Quantizer  # codebooks of width 0 for "random"
    embedding: np.ndarray  # float32 [I, D], blocks L2-normalised
    report: dict[str, Any]  # JSON types only


def build_semantic_ids(
    items: ItemTable,
    log: EventLog,
    valid_day: int,
    *,
    levels: int = 3,
    codebook: int = 256,
    quantizer: str = "rq-kmeans",
    encoder: str = "auto",
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> SemanticIds:
    """Embed the items, quantise, assign one-to-one; ``log`` as for `embed_items`.

    The last codes of level 1 are the cold prefix: items with a zero vector lie there in table order, and one such code
    is always kept for items to come. ``quantizer`` is one of ``QUANTIZERS``; "random" gives every item a random leaf,
    as a control. Raises InputError for unknown names and for too few codes.
    """
    check_shape(len(items), levels, codebook, quantizer)
    began = time.perf_counter()
    embedded = embed_items(items, log, valid_day, encoder=encoder, seed=seed, report=report)
    seconds = {"embed_seconds": round(time.perf_counter() - began, 2)}
    return name_items(
        embedded, seconds, levels=levels, codebook=codebook, quantizer=quantizer, seed=seed, report=report
    )


def choose_shape(
    n_items: int, levels: int | None, codebook: int | None, report: Callable[[str], None]
) -> tuple[int, int]:
    """Levels and codes a level for so many items, where they are not given, and a word about it.

    3 levels of 256 codes, more levels where these would leave fewer than `ROOM` names an item, and more codes where the
    levels are given (negfast's choice).
    """
    if levels is not None and codebook is not None:
        return levels, codebook
    wanted = ROOM * n_items
    if levels is None:
        codebook = LEAST_CODES if codebook is None else codebook
        levels = next(level for level in range(LEAST_LEVELS, 64) if codebook**level >= wanted)
    else:
        codebook = LEAST_CODES
        while codebook**levels < wanted and codebook < MOST_CODES:
            codebook *= 2
    report(f"semantic IDs: {n_items:,} items: {levels} levels of {codebook} codes (--levels and --codebook set it)")
    return levels, codebook


def check_shape(n_items: int, levels: int, codebook: int, quantizer: str) -> None:
    """Raises InputError for an unknown quantizer and where ``levels`` of ``codebook`` codes cannot do."""
    if quantizer not in QUANTIZERS:
        raise InputError(f"semantic IDs: expected quantizer {', '.join(QUANTIZERS)}, found {quantizer!r}")
    if levels < 1 or not 2 <= codebook <= MOST_CODES:
        raise InputError(f"semantic IDs: expected levels >= 1 and codebook in 2..65536, found {levels} x {codebook}")
    if codebook**levels > 2**62:  # leaves are numbered in int64
        raise InputError(f"semantic IDs: {levels} levels of {codebook} codes are more than 2^62 names")
    if codebook**levels < n_items:
        raise InputError(f"semantic IDs: {levels} levels of {codebook} codes cannot name {n_items} items apart")


def name_items(
    embedded: ItemEmbedding,
    facts: dict[str, Any],
    *,
    levels: int,
    codebook: int,
    quantizer: str,
    seed: int,
    report: Callable[[str], None],
) -> SemanticIds:
    """Semantic IDs of embedded items, and how good they are beside ``facts`` in the report."""
    vectors, cold = embedded.vectors, embedded.cold
    facts = {
        "quantizer": quantizer,
        "levels": levels,
        "codebook": codebook,
        "seed": seed,
        "blocks": embedded.blocks,
        "cold_items": int(cold.sum()),
        **facts,
    }
    began = time.perf_counter()
    if quantizer == "random":
        codes = random_codes(len(vectors), np.empty((0, levels), dtype=np.uint16), codebook, seed)
        fitted = Quantizer.plain(np.zeros((levels, codebook, 0), dtype=np.float32))
    else:
        codes, fitted = _quantised(vectors, cold, levels, codebook, quantizer, seed)
        if not cold.all():
            facts |= quantisation(vectors[~cold], codes[~cold], fitted)
    facts["quantize_seconds"] = round(time.perf_counter() - began, 2)
    facts["level"] = usage(codes, codebook)
    leaves = np.sort(leaf_numbers(codes, codebook))
    nodes = (leaves // codebook ** (levels - level) for level in range(1, levels + 1))
    facts["nodes"] = [1 + int(np.count_nonzero(np.diff(node))) for node in nodes]
    facts["neighbour_overlap"] = neighbour_overlap(vectors, codes, seed)
    for line in _lines(facts):
        report(line)
    return SemanticIds(codes, fitted, vectors, facts)


def _quantised(
    vectors: np.ndarray, cold: np.ndarray, levels: int, codebook: int, quantizer: str, seed: int
) -> tuple[np.ndarray, Quantizer]:
    under_code = codebook ** (levels - 1)
    n_cold, n_warm = int(cold.sum()), int((~cold).sum())
    reserved = max(1, -(-n_cold // under_code))
    if n_warm > (codebook - reserved) * under_code:
        raise InputError(
            f"semantic IDs: {levels} levels of {codebook} codes, {reserved} of the first level kept for cold items, "
            f"cannot name {n_warm} items apart"
        )
    codes = np.empty((len(vectors), levels), dtype=np.uint16)
    codes[cold] = digits(np.arange(n_cold) + (codebook - reserved) * under_code, levels, codebook)
    if n_warm == 0:
        return codes, Quantizer.plain(np.full((levels, codebook, vectors.shape[1]), np.nan, dtype=np.float32))
    warm = vectors[~cold]
    if quantizer == "rq-vae":
        from negfast.sid.rqvae import fit_rq_vae as fit  # imports torch
    else:
        fit = fit_balanced if quantizer == "balanced" else fit_rq_kmeans
    fitted = fit(warm, [codebook - reserved] + [codebook] * (levels - 1), codebook, seed)
    codes[~cold] = assign_codes(warm, fitted)
    return codes, fitted


def _lines(facts: dict[str, Any]) -> list[str]:
    blocks = " + ".join(f"{name} {width}" for name, width in facts["blocks"].items())
    usage = ", ".join(f"{level['used']} ({level['perplexity']})" for level in facts["level"])
    lines = [
        f"semantic IDs: {facts['levels']} x {facts['codebook']} {facts['quantizer']} of {blocks}; "
        f"codes used (perplexity) {usage}; {facts['cold_items']} cold items"
    ]
    if "collisions_before" in facts:
        lines.append(
            f"semantic IDs: collisions {facts['collisions_before']} -> {facts['collisions_after']}, {facts['moved']} "
            f"items moved, error {facts['error_before']:.4f} -> {facts['error_after']:.4f}"
        )
    if facts["neighbour_overlap"]:
        shares = ", ".join(f"{share:.1%}" for share in facts["neighbour_overlap"])
        lines.append(f"semantic IDs: of an item's nearest neighbours share its first code, first two, ...: {shares}")
    return lines
