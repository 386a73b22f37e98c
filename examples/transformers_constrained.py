"""What a user will dislike, by transformers alone: the directory of `negfast export`, beam search on its trie.

    negfast export runs/quickstart --out exported
    python examples/transformers_constrained.py exported examples/events.csv --at 1370200000 --top 10

negfast is not imported. The community prior stays with negfast, so the order differs from `negfast predict`.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

FORMAT = 2  # of negfast.json


class Trie:
    """Which codes may follow a prefix: children of node n of level l are first_child.l[n] to first_child.l[n + 1]."""

    def __init__(self, folder: Path, about: dict, seen: list[int]) -> None:
        """``seen`` are rows of the SID table that must not be generated."""
        arrays = load_file(folder / "trie.safetensors")
        self.levels, self.codebook, self.first_code = about["levels"], about["codebook"], about["tokens"]["codes"]
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


def read_about(folder: Path) -> dict:
    """negfast.json; ends the program with one line where this example does not know its format."""
    about = json.loads((folder / "negfast.json").read_text())
    if about.get("format") != FORMAT or about["history"]["positions"] != "events":
        raise SystemExit(f"{folder}: expected an export of format {FORMAT} with one position an event")
    return about


def read_events(path: Path, codes: dict[str, list[int]], at: int) -> list[tuple[str, str, int]]:
    """(item, feedback, time) of the events before ``at``, oldest first."""
    with path.open(newline="") as file:
        events = [(row["item"], row["feedback"], int(row["time"])) for row in csv.DictReader(file)]
    for item, _, _ in events:
        if item not in codes:
            raise SystemExit(f"found no item {item!r} in sid_table.parquet; its first is {next(iter(codes))!r}")
    return sorted((event for event in events if event[2] < at), key=lambda event: event[2])


def gap_token(about: dict, seconds: int) -> int:
    """The token of the time between two events."""
    return about["tokens"]["gap-0"] + min(about["gaps"] - 1, 1 + (seconds // 64).bit_length())


def history_sums(
    about: dict, codes: dict[str, list[int]], events: list[tuple[str, str, int]], at: int
) -> list[list[int]]:
    """The tokens whose embeddings make each position, padded with <|none|>: a start, the latest events of a window, and
    the marker after which the codes of the next dislike come."""
    tokens = about["tokens"]
    stride = about["history"]["window"] - about["history"]["window"] // 4
    first = max(-(-(len(events) - about["history"]["window"]) // stride), 0) * stride
    sums, before = [[tokens["history"], tokens["gap-0"]]], None
    for item, feedback, time in events[first:]:
        gap = tokens["gap-0"] if before is None else gap_token(about, time - before)
        sums.append([*codes[item], tokens[feedback], gap])
        before = time
    sums.append([tokens["next-dislike"], tokens["gap-0"] if before is None else gap_token(about, at - before)])
    return [position + [tokens["none"]] * (about["levels"] + 2 - len(position)) for position in sums]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `negfast export` wrote")
    parser.add_argument("events", type=Path, help="CSV of one user: item, feedback (like, dislike, shown), time (s)")
    parser.add_argument("--at", type=int, required=True, help="the second that is asked about; events before it count")
    parser.add_argument("--top", type=int, default=10)
    options = parser.parse_args()

    about = read_about(options.folder)
    rows = parquet.read_table(options.folder / "sid_table.parquet")
    items, texts = rows["item"].to_pylist(), rows["text"].to_pylist()
    codes = dict(zip(items, rows["tokens"].to_pylist(), strict=True))
    events = read_events(options.events, codes, options.at)
    seen = {item for item, _, _ in events}
    trie = Trie(options.folder, about, [row for row, item in enumerate(items) if item in seen])
    model = AutoModelForCausalLM.from_pretrained(options.folder).eval()
    sums = torch.tensor([history_sums(about, codes, events, options.at)])
    inputs = model.get_input_embeddings()(sums).sum(2)
    found = model.generate(
        inputs_embeds=inputs,
        attention_mask=torch.ones(inputs.shape[:2], dtype=torch.int64),
        max_new_tokens=trie.levels,
        min_new_tokens=trie.levels,
        num_beams=max(2 * options.top, 20),
        num_return_sequences=options.top,
        do_sample=False,
        length_penalty=0.0,
        renormalize_logits=True,  # over the codes that exist, not over the whole vocabulary
        prefix_allowed_tokens_fn=lambda _, sofar: trie.children(sofar.tolist())[0].tolist(),
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=model.config.pad_token_id or 0,
    )
    for completion, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        if score == -np.inf:
            continue
        row = trie.item(completion)
        print(f"{np.exp(score):.5f}  {items[row]}  {texts[row]}")


if __name__ == "__main__":
    main()
