"""What a user will dislike, by vLLM: beam search on the trie of `negfast export`, a level a call.

Needs `pip install vllm` and a GPU. **It was never run**: nobody had a GPU when it was written. It was read against the
documentation of vLLM 0.20 to 0.22 (LLM, SamplingParams, the sampler's order of steps); the trie and the
prompt are those of transformers_constrained.py, which a test runs.

    negfast export runs/quickstart --out exported
    python examples/vllm_constrained.py exported --liked 1074638 1853728 --disliked 1430132 --top 10

Each level asks for one token among the codes that exist (`allowed_token_ids`); vLLM's prefix cache keeps the prompt.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from transformers import AutoTokenizer
from transformers_constrained import Trie, prompt, rows_of
from vllm import LLM, SamplingParams


def beam_search(model: LLM, trie: Trie, start: list[int], beams: int) -> list[tuple[float, list[int]]]:
    """(log-probability, completion tokens), best first; probabilities are over the codes that exist."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(trie.levels):
        allowed = [trie.children(tokens)[0].tolist() for _, tokens in alive]
        sampling = [
            SamplingParams(max_tokens=1, temperature=0.0, allowed_token_ids=codes, logprobs=min(len(codes), beams))
            for codes in allowed
        ]
        outputs = model.generate(
            [{"prompt_token_ids": start + tokens} for _, tokens in alive], sampling, use_tqdm=False
        )
        grown = [
            (score + entry.logprob, [*tokens, token])
            for (score, tokens), codes, output in zip(alive, allowed, outputs, strict=True)
            for token, entry in output.outputs[0].logprobs[0].items()
            if token in codes
        ]
        alive = sorted(grown, key=lambda beam: -beam[0])[:beams]
    return alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `negfast export` wrote")
    parser.add_argument("--liked", nargs="*", default=[], metavar="ITEM")
    parser.add_argument("--disliked", nargs="*", default=[], metavar="ITEM")
    parser.add_argument("--top", type=int, default=10)
    options = parser.parse_args()

    rows = parquet.read_table(options.folder / "sid_table.parquet")
    items, texts = rows["item"].to_pylist(), rows["text"].to_pylist()
    tokens = dict(zip(items, rows["tokens"].to_pylist(), strict=True))
    trie = Trie(options.folder, rows_of(items, options.liked + options.disliked))
    beams = max(2 * options.top, 20)
    model = LLM(
        model=str(options.folder),
        enable_prefix_caching=True,
        max_logprobs=beams,
        logprobs_mode="processed_logprobs",  # after the codes that do not exist were struck out
    )
    start = prompt(AutoTokenizer.from_pretrained(options.folder), tokens, options.liked, options.disliked)
    for score, completion in beam_search(model, trie, start, beams)[: options.top]:
        row = trie.item(completion)
        print(f"{np.exp(score):.5f}  {items[row]}  {texts[row]}")


if __name__ == "__main__":
    main()
