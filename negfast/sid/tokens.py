"""The vocabulary block that negfast appends to a model's: markers, then L*K semantic-ID codes, level-major."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negfast.data.shards import GAPS

FEEDBACK = ("shown", "like", "dislike", "withdrawn", "history")  # in the order of the log's codes, then a start
MARKERS = (
    "none",  # fills the places of a sum that are not used
    *FEEDBACK,
    *(f"gap-{number}" for number in range(GAPS)),
    "next-dislike",
    "next-like",
    "item",
    "text",
)


@dataclass(frozen=True)
class CodeVocabulary:
    """Token ids of the block for L levels of K codes, on top of a vocabulary of ``base`` tokens.

    Ids are ``base + i``: the markers in the order of ``MARKERS``, then the K codes of level 1, of level 2, ...
    Levels count from 1 as in the trie, whose level 0 is the root.
    """

    base: int
    levels: int
    codebook: int

    @property
    def size(self) -> int:
        """Number of tokens of the block."""
        return len(MARKERS) + self.levels * self.codebook

    @property
    def tokens(self) -> list[str]:
        """The block's token strings by id: ``<|none|>``, ..., ``<|s1_0|>``, ..."""
        codes = [f"<|s{lv}_{c}|>" for lv in range(1, self.levels + 1) for c in range(self.codebook)]
        return [f"<|{name}|>" for name in MARKERS] + codes

    def marker(self, name: str) -> int:
        """Token id of a marker, e.g. ``marker("next-dislike")``; an unknown name is a ValueError."""
        return self.base + MARKERS.index(name)

    def code_base(self, level: int) -> int:
        """Token id of code 0 of a level in 1..L."""
        if not 1 <= level <= self.levels:
            raise ValueError(f"level {level} is outside 1..{self.levels}")
        return self.base + len(MARKERS) + (level - 1) * self.codebook

    def code_bases(self, device: torch.device) -> Tensor:
        """`code_base` of every level, int64 [L], made on ``device``: the host does not wait for it."""
        first = self.code_base(1)
        return torch.arange(first, first + self.levels * self.codebook, self.codebook, device=device)

    def item_tokens(self, codes: np.ndarray) -> np.ndarray:
        """Codes of items, [I, L] of any integer type, to their token ids, int32 [I, L]."""
        first = np.array([self.code_base(level) for level in range(1, self.levels + 1)], dtype=np.int32)
        return codes.astype(np.int32) + first
