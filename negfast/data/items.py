"""The item table: what is known of an item besides its events."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class ItemTable:
    """I items; row i describes the item with index i in the event log."""

    ids: list[str]
    text: list[str]  # title or description; "" where the source has none
    attributes: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)  # name -> values of each item
    embedding: np.ndarray | None = None  # float32 [I, D], the user's own (e.g. of images)
    original: int | None = None  # so many items, the first, were there when the codebooks were made; None: all
    # made with the semantic IDs, None before: float32 [I, D], what they were made of; uint16 [I, L]
    vectors: np.ndarray | None = field(default=None, compare=False)
    codes: np.ndarray | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> "ItemTable":
        """The items at ``rows``, in that order."""
        return replace(
            self,
            ids=[self.ids[row] for row in rows],
            text=[self.text[row] for row in rows],
            attributes={name: [values[row] for row in rows] for name, values in self.attributes.items()},
            embedding=None if self.embedding is None else self.embedding[list(rows)],
            vectors=None,
            codes=None,
            original=None,
        )

    def extended(self, ids: Sequence[str]) -> "ItemTable":
        """The table, and after it items of which only the id is known: no text, no attributes, an embedding of 0."""
        embedding, bare = self.embedding, len(ids)
        if embedding is not None:
            embedding = np.concatenate([embedding, np.zeros((bare, embedding.shape[1]), np.float32)])
        return replace(
            self,
            ids=[*self.ids, *ids],
            text=[*self.text, *[""] * bare],
            attributes={name: [*values, *[()] * bare] for name, values in self.attributes.items()},
            embedding=embedding,
            vectors=None,
            codes=None,
        )
