"""Text as a target: what the model says of an item in its own words, by cross entropy over its whole vocabulary.

``<|item|> sid <|text|>`` -> the title; ``<|item|> sid <|text|> genres:`` -> the values of an attribute.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negfast.kernels.vocabulary_cross_entropy import vocabulary_cross_entropy
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.runtime.engine import Engine
from negfast.staging import put
from negfast.train.order import epoch_rows
from negfast.train.step import WHOLE, MicroBatch

TEXT_TOKENS = 48  # of a title or of an attribute's values are read or generated
EXAMPLES_AT_ONCE = 256


@dataclass(frozen=True)
class TextExample:
    """What is asked of an item, and what should follow."""

    item: int
    kind: str  # "title", or the attribute's name
    question: list[int]  # tokens after <|text|>
    target: list[int]  # tokens, the end of text included where the tokenizer has one


def title_examples(engine: Engine, items: np.ndarray) -> list[TextExample]:
    """SID -> title, for the ``items`` that have one."""
    texts = engine.data.items.text
    named = [int(i) for i in items if texts[i].strip()]
    targets = encode(engine, [texts[i].strip() for i in named])
    return [TextExample(i, "title", [], target + _end(engine)) for i, target in zip(named, targets, strict=True)]


def attribute_examples(engine: Engine, items: np.ndarray) -> list[TextExample]:
    """SID -> the values of an attribute, sorted: an example for each of the ``items`` and each attribute it has."""
    examples = []
    for name, column in engine.data.items.attributes.items():
        having = [int(i) for i in items if column[i]]
        [question] = encode(engine, [f"{name}:"])
        targets = encode(engine, [" " + ", ".join(sorted(column[i])) for i in having])
        examples += [
            TextExample(i, name, question, target + _end(engine)) for i, target in zip(having, targets, strict=True)
        ]
    return examples


def encode(engine: Engine, texts: Sequence[str]) -> list[list[int]]:
    """The first ``TEXT_TOKENS`` tokens of each text, without the tokenizer's own marks."""
    if not texts:
        return []
    encoded = engine.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [list(ids)[:TEXT_TOKENS] for ids in encoded]


def _end(engine: Engine) -> list[int]:
    end = engine.tokenizer.eos_token_id
    return [] if end is None else [int(end)]


class SidToText:
    """``<|item|> sid <|text|> question`` -> target, packed without padding."""

    def __init__(self, engine: Engine, name: str, batch: int, train: list[TextExample], held: list[TextExample]):
        """``name`` sets the order of the examples; ``held`` are never trained on."""
        self.engine, self.name, self.batch, self.train, self.held = engine, name, batch, train, held

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> "PackedText":
        """The micro-batch's examples of a step."""
        rows = epoch_rows(self.engine.config.train.seed, self.name, step, len(self.train), self.batch)
        count = sum(len(self.train[row].target) for row in rows)
        return pack(self.engine, [self.train[row] for row in rows[micro_batch.of(len(rows))]], count)

    def loss(self, batch: "PackedText") -> Tensor:
        """The micro-batch's part of the mean negative log-likelihood of a target token."""
        return text_nll(self.engine.policy, target_states(self.engine, batch), batch.targets) / batch.target_tokens

    @torch.no_grad()
    def accuracy(self) -> dict[str, float]:
        """Of the held-out items: the share of target tokens that the model puts first after the true ones before them,
        and of each kind the share of targets it gets right from end to end, decoding greedily."""
        right, kinds = [], []
        for start in range(0, len(self.held), EXAMPLES_AT_ONCE):
            examples = self.held[start : start + EXAMPLES_AT_ONCE]
            packed = pack(self.engine, examples, sum(len(example.target) for example in examples))
            predicted = self.engine.policy.text_head(target_states(self.engine, packed)).argmax(-1)
            lengths = [len(example.target) for example in examples]
            right += (predicted == packed.targets).cpu().split(lengths)
            kinds += [example.kind for example in examples]
        if not kinds:
            return {}
        whole = np.array([bool(tokens.all()) for tokens in right])
        exact = {f"{kind}_exact": float(whole[np.array(kinds) == kind].mean()) for kind in sorted(set(kinds))}
        return {"token": float(torch.cat(right).float().mean()), **exact}


@dataclass(frozen=True)
class PackedText:
    """Examples one after the other: ``rows`` are the packed places after which the tokens ``targets`` come."""

    layout: GroupLayout  # prompts without completions
    token_ids: Tensor  # int64 [T]
    rows: Tensor  # int64 [N]
    targets: Tensor  # int64 [N]
    target_tokens: int  # of the whole batch, of which these may be a micro-batch

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


def pack(engine: Engine, examples: Sequence[TextExample], target_tokens: int) -> PackedText:
    """Packs examples; the last token of an example is a target alone, since nothing comes after it."""
    vocabulary, item_tokens = engine.policy.vocabulary, engine.histories.item_tokens
    item, text = vocabulary.marker("item"), vocabulary.marker("text")
    tokens = [
        np.array([item, *item_tokens[e.item].tolist(), text, *e.question, *e.target[:-1]], dtype=np.int64)
        for e in examples
    ]
    ends = np.cumsum([len(sequence) for sequence in tokens])
    lengths = np.array([len(example.target) for example in examples])
    before = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.arange(before[-1]) + np.repeat(ends - before[1:], lengths)

    targets = np.concatenate([np.array(example.target, dtype=np.int64) for example in examples])
    return PackedText(
        GroupLayout.build(np.concatenate([[0], ends]), engine.device),
        put(np.concatenate(tokens), engine.device),
        put(rows, engine.device),
        put(targets, engine.device),
        target_tokens,
    )


def target_states(engine: Engine, packed: PackedText) -> Tensor:
    """Hidden states [N, d] after which the targets come."""
    return engine.policy.hidden(packed.layout, packed.token_ids, None, has_text=True)[packed.rows]


def text_nll(policy: Policy, states: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of the decoder's own tokens ``targets`` int64 [N] after ``states`` [N, d], over its whole
    vocabulary."""
    return vocabulary_cross_entropy(policy.text_head(states), targets).sum()
