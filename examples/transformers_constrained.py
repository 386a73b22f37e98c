"""What a user will dislike, by transformers alone: the directory of `negfast export`, beam search on its trie.

    negfast export runs/quickstart --out exported
    python examples/transformers_constrained.py exported --liked 1074638 1853728 --disliked 1430132 --top 10

negfast is not imported. The community prior stays with negfast, so the order differs from `negfast predict`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MARKERS = 10  # tokens of the block before the codes


class Trie:
    """Which codes may follow a prefix: children of node n of level l are first_child.l[n] to first_child.l[n + 1]."""

    def __init__(self, folder: Path, seen: list[int]) -> None:
        """``seen`` are rows of the SID table that must not be generated."""
        about, arrays = json.loads((folder / "negfast.json").read_text()), load_file(folder / "trie.safetensors")
        self.levels, self.codebook = about["levels"], about["codebook"]
        self.first_code = about["base"] + MARKERS
        self.leaf_item = arrays["leaf_item"]
        self.first_child = [arrays[f"first_child.{level}"] for level in range(self.levels)]
        bits = [arrays[f"child_bits.{level}"].view(np.uint8) for level in range(self.levels)]
        self.has_code = [np.unpackbits(table, axis=1, bitorder="little").astype(bool) for table in bits]
        self.unseen = [(~np.isin(self.leaf_item, seen)).astype(np.int64)]  # leaves under each node, level by level
        for first in self.first_child[::-1]:
            self.unseen.insert(0, np.add.reduceat(self.unseen[0], first[:-1]))

    def children(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may follow the completion ``tokens``, and the nodes that they lead to.

        Where fewer codes exist than beams, beam search goes on with beams of no probability: those get a token too.
        """
        node = 0
        for level, token in enumerate(tokens):
            codes, nodes = self._below(level, node)
            if token not in codes:
                return np.array([self.first_code]), np.array([0])
            node = int(nodes[codes == token][0])
        codes, nodes = self._below(len(tokens), node)
        open_ = self.unseen[len(tokens) + 1][nodes] > 0
        return codes[open_], nodes[open_]

    def item(self, tokens: list[int]) -> int:
        """The row of the SID table that a whole completion names."""
        codes, nodes = self.children(tokens[:-1])
        return int(self.leaf_item[nodes[codes == tokens[-1]][0]])

    def _below(self, level: int, node: int) -> tuple[np.ndarray, np.ndarray]:
        codes = np.flatnonzero(self.has_code[level][node])
        nodes = self.first_child[level][node] + np.arange(len(codes))
        return codes + self.first_code + level * self.codebook, nodes


def prompt(tokenizer, table: dict[str, list[int]], liked: list[str], disliked: list[str]) -> list[int]:
    """Oldest first, as in training: <|likes|> sid* <|dislikes|> sid* <|next-dislike|>."""
    marker = tokenizer.convert_tokens_to_ids
    likes, dislikes = ([token for item in items for token in table[item]] for items in (liked, disliked))
    return [marker("<|likes|>"), *likes, marker("<|dislikes|>"), *dislikes, marker("<|next-dislike|>")]


def rows_of(table: list[str], items: list[str]) -> list[int]:
    """The rows of the SID table that hold ``items``; ends the program with one line where an item is unknown."""
    row = {item: number for number, item in enumerate(table)}
    for item in items:
        if item not in row:
            raise SystemExit(f"found no item {item!r} in sid_table.parquet; its first is {table[0]!r}")
    return [row[item] for item in items]


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
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder).eval()
    ids = torch.tensor([prompt(tokenizer, tokens, options.liked, options.disliked)])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=trie.levels,
        min_new_tokens=trie.levels,
        num_beams=max(2 * options.top, 20),
        num_return_sequences=options.top,
        do_sample=False,
        length_penalty=0.0,
        renormalize_logits=True,  # over the codes that exist, not over the whole vocabulary
        prefix_allowed_tokens_fn=lambda _, sofar: trie.children(sofar[ids.shape[1] :].tolist())[0].tolist(),
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    for completion, score in zip(
        found.sequences[:, ids.shape[1] :].tolist(), found.sequences_scores.tolist(), strict=True
    ):
        if score == -np.inf:
            continue
        row = trie.item(completion)
        print(f"{np.exp(score):.5f}  {items[row]}  {texts[row]}")


if __name__ == "__main__":
    main()
