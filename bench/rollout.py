"""Constrained beam search: negfast beside transformers' ``generate`` with a prefix function, on the same small Qwen3.

The weights are the same, and the prior is off. ``generate`` masks its full-vocabulary log-probabilities, negfast
renormalises them over the trie, so lists can differ; the overlap of the top 20 is part of the result.
"""

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.grpo import PACKAGES, TEXT_TOKENS, Case, Ours, merged_model, seconds_of
from bench.machine import device_name, versions
from negfast.model.beam import beam_search
from negfast.sid.prior import NEXT_DISLIKE

TOP = 20


def run(
    out: Path | None = None, prompt: int = 512, prompts: int = 4, repeats: int = 5, threads: int = 2
) -> dict[str, Any]:
    """Measures beams of 20, 50 and 256 in turns, prints a table and writes the JSON result to ``out``."""
    torch.set_num_threads(threads)
    case = Case(prompt=prompt, group=1, prompts=prompts, objective="full")
    ours = Ours(case)
    ours.seen = [np.empty(0, dtype=np.int64)] * prompts
    ours.policy.eval()
    model = merged_model(ours.policy, case, TEXT_TOKENS + ours.policy.vocabulary.size).eval()
    following = allowed_tokens(ours)
    tokens = ours.tokens.view(prompts, prompt)
    item_of = {tuple(codes): item for item, codes in enumerate(ours.trie.codes.tolist())}
    first = torch.tensor([ours.policy.vocabulary.code_base(level) for level in range(1, case.levels + 1)])

    def search(width: int) -> list[list[int]]:
        batch = ours.batch()
        arguments = (ours.policy, ours.chooser, batch.layout, batch.tokens, batch.prior, NEXT_DISLIKE)
        return beam_search(*arguments, width=width, top=width)[0].tolist()

    def generate(width: int) -> list[list[int]]:
        found = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=case.levels,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, ids: following[tuple(ids[prompt:].tolist())],
            pad_token_id=0,
            eos_token_id=None,
        )
        codes = (found[:, prompt:] - first).view(prompts, width, case.levels)
        return [[item_of[tuple(row)] for row in beams] for beams in codes.tolist()]

    rows, ratios = [], []
    for width in (20, 50, 256):
        mine, theirs = search(width), generate(width)  # warm, and compared
        overlap = statistics.mean(len(set(a[:TOP]) & set(b[:TOP])) / TOP for a, b in zip(mine, theirs, strict=True))
        seconds: dict[str, list[float]] = {"negfast": [], "transformers generate": []}
        for _ in range(repeats):
            seconds["negfast"].append(seconds_of(lambda: search(width)))  # noqa: B023
            seconds["transformers generate"].append(seconds_of(lambda: generate(width)))  # noqa: B023
        about = {**asdict(replace(case, group=0)), "beams": width}
        for system, times in seconds.items():
            rows.append(
                {
                    "system": system,
                    "case": about,
                    "status": "ok",
                    "median_s": statistics.median(times),
                    "seconds": times,
                    "top20_overlap": overlap,
                }
            )
        ratio = rows[-1]["median_s"] / rows[-2]["median_s"]
        ratios.append({"case": about, "peer": "transformers generate", "figure": "median_s", "ratio": ratio})
        print(
            f"beams {width:>3}: negfast {rows[-2]['median_s']:.3f} s, generate {rows[-1]['median_s']:.3f} s,"
            f" {ratio:.1f}x, overlap {overlap:.2f}",
            flush=True,
        )
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
        out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result


def allowed_tokens(ours: Ours) -> dict[tuple[int, ...], list[int]]:
    """Token ids that may follow each prefix of an item's tokens."""
    following: dict[tuple[int, ...], set[int]] = {}
    for item in ours.policy.vocabulary.item_tokens(ours.trie.codes).tolist():
        for level in range(len(item)):
            following.setdefault(tuple(item[:level]), set()).add(item[level])
    return {prefix: sorted(tokens) for prefix, tokens in following.items()}
