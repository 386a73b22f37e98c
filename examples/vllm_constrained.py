"""What users will dislike, by vLLM: the lists of `negfast predict`, a level of semantic IDs a call.

Needs `pip install vllm` and a GPU. It is written for the V1 engine of vLLM 0.14 to 0.22; a test runs it on a stub of
that interface, nobody has run it on vLLM itself.

    negfast export runs/quickstart --out exported
    python examples/vllm_constrained.py exported examples/events.csv --top 10

A logits processor keeps the codes that may come next and adds the community prior. A position of a history is a sum of
embeddings, so prompts are given as embeddings.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exported import Export, Walk
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class OnTrie(AdapterLogitsProcessor):
    """Leaves the codes that may come next, and adds the community prior to their logits.

    A request asks for it by ``extra_args``: "seen" are rows of items that must not come out, "completion" the tokens of
    an item that its prompt ends with.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self.export = Export(Path(vllm_config.model_config.model))
        self.walks: dict[tuple[int, ...], Walk] = {}  # the last user's

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[..., torch.Tensor] | None:
        extra = params.extra_args or {}
        if "seen" not in extra:
            return None
        seen, completion = tuple(extra["seen"]), list(extra["completion"])
        if seen not in self.walks:
            self.walks = {seen: Walk(self.export, set(seen))}
        walk = self.walks[seen]

        def only_codes(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            codes, log_prior = (torch.from_numpy(x).to(logits.device) for x in walk.next([*completion, *output]))
            kept = logits[codes] + log_prior.to(logits)
            return logits.fill_(-torch.inf).index_copy_(0, codes, kept)

        return only_codes


def listed(
    model: LLM, rows: torch.Tensor, start: torch.Tensor, walk: Walk, seen: list[int], beams: int, top: int
) -> list[tuple[float, int]]:
    """(probability, item), best first, by beam search; ``start`` [P, d] are the embeddings of the prompt, ``rows``
    [V, d] those of tokens."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    for level in range(walk.levels):
        keep = beams if level < walk.levels - 1 else top
        params = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                logprobs=min(beams, walk.codebook),
                extra_args={"seen": seen, "completion": completion},
            )
            for _, completion in alive
        ]
        prompts = [{"prompt_embeds": torch.cat([start, rows[completion]])} for _, completion in alive]
        outputs = model.generate(prompts, params, use_tqdm=False)
        grown = [
            (score + entry.logprob, [*completion, token])
            for (score, completion), output in zip(alive, outputs, strict=True)
            for token, entry in output.outputs[0].logprobs[0].items()
            if entry.logprob > -1e8
        ]
        alive = sorted(grown, key=lambda beam: -beam[0])[:keep]
    return [(float(np.exp(score)), walk.item(completion)) for score, completion in alive]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `negfast export` wrote")
    parser.add_argument("events", type=Path, help="CSV of users' events: user, item, time (s), feedback")
    parser.add_argument("--top", type=int, default=10)
    options = parser.parse_args()

    export, out = Export(options.folder), csv.writer(sys.stdout)
    export.read_events(options.events)
    moment, beams = export.moment(None, of_lists=True), max(export.about["beam"], options.top)
    rows = AutoModelForCausalLM.from_pretrained(options.folder).get_input_embeddings().weight.detach()
    model = LLM(
        model=str(options.folder),
        dtype="float32",
        enable_prompt_embeds=True,
        logits_processors=[OnTrie],
        max_logprobs=min(beams, export.about["codebook"]),
        logprobs_mode="processed_logprobs",  # of what the processor left
    )
    out.writerow(["user", "rank", "item", "score", "text"])
    for user in list(export.events):
        sums, gap = export.positions(user, moment)
        sums.append(export.padded([export.tokens["next-dislike"], gap]))
        seen = sorted({event.item for event in export.before(user, moment)})
        start = rows[torch.tensor(sums)].sum(1)
        lists = listed(model, rows, start, Walk(export, set(seen)), seen, beams, options.top)
        for rank, (score, item) in enumerate(lists, start=1):
            out.writerow([user, rank, export.items[item], f"{score:.9f}", export.texts[item]])


if __name__ == "__main__":
    main()
