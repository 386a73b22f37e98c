"""What a user will dislike, by vLLM: beam search on the trie of `negfast export`, a level a call.

Needs `pip install vllm` and a GPU. **It was never run**: nobody had a GPU when it was written. It was read against the
documentation of vLLM 0.20 to 0.22 (LLM, SamplingParams, prompt embeddings, the sampler's order of steps); the trie and
the positions are those of transformers_constrained.py, which a test runs.

    negfast export runs/quickstart --out exported
    python examples/vllm_constrained.py exported examples/events.csv --at 1370200000 --top 10

Each level asks for one token among the codes that exist (`allowed_token_ids`). A position of a history is a sum of
embeddings, so prompts are given as embeddings.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from transformers import AutoModelForCausalLM
from transformers_constrained import Trie, history_sums, read_about, read_events
from vllm import LLM, SamplingParams


def beam_search(
    model: LLM, rows: torch.Tensor, trie: Trie, start: torch.Tensor, beams: int
) -> list[tuple[float, list[int]]]:
    """(log-probability, completion tokens), best first; probabilities are over the codes that exist.

    ``start`` [P, d] are the embeddings of the prompt, ``rows`` [V, d] those of tokens.
    """
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(trie.levels):
        allowed = [trie.children(tokens)[0].tolist() for _, tokens in alive]
        sampling = [
            SamplingParams(max_tokens=1, temperature=0.0, allowed_token_ids=codes, logprobs=min(len(codes), beams))
            for codes in allowed
        ]
        prompts = [{"prompt_embeds": torch.cat([start, rows[tokens]])} for _, tokens in alive]
        outputs = model.generate(prompts, sampling, use_tqdm=False)
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
    parser.add_argument("events", type=Path, help="CSV of one user: item, feedback (like, dislike, shown), time (s)")
    parser.add_argument("--at", type=int, required=True, help="the second that is asked about; events before it count")
    parser.add_argument("--top", type=int, default=10)
    options = parser.parse_args()

    about = read_about(options.folder)
    table = parquet.read_table(options.folder / "sid_table.parquet")
    items, texts = table["item"].to_pylist(), table["text"].to_pylist()
    codes = dict(zip(items, table["tokens"].to_pylist(), strict=True))
    events = read_events(options.events, codes, options.at)
    seen = {item for item, _, _ in events}
    trie = Trie(options.folder, about, [row for row, item in enumerate(items) if item in seen])
    with torch.no_grad():
        rows = AutoModelForCausalLM.from_pretrained(options.folder).get_input_embeddings().weight
        start = rows[torch.tensor(history_sums(about, codes, events, options.at))].sum(1)
    beams = max(2 * options.top, 20)
    model = LLM(
        model=str(options.folder),
        enable_prompt_embeds=True,
        max_logprobs=beams,
        logprobs_mode="processed_logprobs",  # after the codes that do not exist were struck out
    )
    for score, completion in beam_search(model, rows, trie, start, beams)[: options.top]:
        row = trie.item(completion)
        print(f"{np.exp(score):.5f}  {items[row]}  {texts[row]}")


if __name__ == "__main__":
    main()
