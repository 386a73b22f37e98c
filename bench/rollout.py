"""Constrained beam search: negfast beside transformers' ``generate`` with a prefix function, on the same small Qwen3.

The same search on both sides, asserted: with ``renormalize_logits`` generate takes its log-probabilities over the
allowed tokens, as negfast does (left alone it takes them over the whole vocabulary and masks afterwards, which ranks
otherwise), and with ``length_penalty`` 0 their sum is the score. The community prior is off, and nothing is seen.
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.grpo import PACKAGES
from bench.grpo_step import Case, Ours, seconds_of
from bench.machine import device_name, versions, write_result
from negfast.model.beam import beam_search
from negfast.serve.export import merged_model
from negfast.sid.prior import MARKERS, NEXT_DISLIKE

WIDTHS = 20, 50, 256
TOP = 20  # compared
ROUNDING = 1e-4  # of a sum of four log-probabilities in float32

Found = tuple[list[list[int]], torch.Tensor]  # items and log-probabilities [B, width], best first


def run(
    out: Path | None = None, prompt: int = 512, prompts: int = 2, repeats: int = 5, threads: int = 2
) -> dict[str, Any]:
    """Measures each width in turns and writes the JSON result to ``out``; AssertionError where the lists differ."""
    torch.set_num_threads(threads)
    search, generate = both_sides(Case((prompt,) * prompts, group=1, objective="full"))
    rows, ratios = [], []
    for width in WIDTHS:
        check_same(search(width), generate(width))  # and warm
        case = {"prompt": prompt, "prompts": prompts, "levels": 4, "beams": width}
        seconds: dict[str, list[float]] = {"negfast": [], "transformers generate": []}
        for _ in range(repeats):
            seconds["negfast"].append(seconds_of(lambda: search(width)))  # noqa: B023
            seconds["transformers generate"].append(seconds_of(lambda: generate(width)))  # noqa: B023
        medians = [statistics.median(times) for times in seconds.values()]
        for (system, times), median in zip(seconds.items(), medians, strict=True):
            rows.append({"system": system, "case": case, "status": "ok", "median_s": median, "seconds": times})
        ratio = medians[1] / medians[0]
        ratios.append({"case": case, "peer": "transformers generate", "figure": "median_s", "ratio": ratio})
        print(f"beams {width:>3}: negfast {medians[0]:.3f} s, generate {medians[1]:.3f} s, {ratio:.1f}x", flush=True)
    result = {
        "bench": "rollout",
        "device": device_name(),
        "threads": threads,
        "versions": versions(*PACKAGES),
        "rows": rows,
        "ratios": ratios,
        "floor": {},
    }
    if out is not None:
        write_result(out, result)
    return result


def both_sides(case: Case) -> tuple[Any, Any]:
    """The two searches, functions of the width."""
    ours = Ours(case)
    ours.seen = [np.empty(0, dtype=np.int64)] * len(case.lengths)
    ours.policy.eval()
    model: Any = merged_model(ours.policy)
    following = allowed_tokens(ours)
    prompts, prompt = len(case.lengths), case.lengths[0]
    marker = torch.full((prompts, 1), ours.policy.vocabulary.marker(MARKERS[NEXT_DISLIKE]))
    tokens = torch.cat([ours.tokens.view(prompts, prompt - 1), marker], dim=1)
    item_of = {tuple(codes): item for item, codes in enumerate(ours.trie.codes.tolist())}
    first = torch.tensor([ours.policy.vocabulary.code_base(level) for level in range(1, case.levels + 1)])

    def search(width: int) -> Found:
        batch = ours.batch()
        items, log_p = beam_search(ours.policy, ours.chooser, batch, batch.prior, NEXT_DISLIKE, width, top=width)
        return items.tolist(), log_p

    def generate(width: int) -> Found:
        found = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=case.levels,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, ids: following[tuple(ids[prompt:].tolist())],
            renormalize_logits=True,
            length_penalty=0.0,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,  # without them sequences come without their scores
        )
        codes = (found.sequences[:, prompt:] - first).view(prompts, width, case.levels)
        items = [[item_of[tuple(row)] for row in beams] for beams in codes.tolist()]
        return items, found.sequences_scores.view(prompts, width)

    return search, generate


def check_same(mine: Found, theirs: Found) -> None:
    """The best ``TOP`` are the same items with the same log-probabilities; within rounding they may change places."""
    assert (mine[1] - theirs[1])[:, :TOP].abs().max() < ROUNDING, "log-probabilities differ"
    for items, scores, others in zip(mine[0], mine[1].tolist(), theirs[0], strict=True):
        last = scores[TOP - 1]
        clear = {item for item, score in zip(items, scores, strict=True) if score > last + ROUNDING}
        assert clear <= set(others[:TOP]) and set(others[:TOP]) <= set(items), "items differ"


def allowed_tokens(ours: Ours) -> dict[tuple[int, ...], list[int]]:
    """Token ids that may follow each prefix of an item's tokens."""
    following: dict[tuple[int, ...], set[int]] = {}
    for item in ours.policy.vocabulary.item_tokens(ours.trie.codes).tolist():
        for level in range(len(item)):
            following.setdefault(tuple(item[:level]), set()).add(item[level])
    return {prefix: sorted(tokens) for prefix, tokens in following.items()}
