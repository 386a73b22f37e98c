"""The item table: what is known of an item besides its events."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class ItemTable:
    """I items; row i describes the item with index i in the event log."""

    ids: list[str]
    text: list[str]  # title or description; "" where the source has none
    attributes: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)  # name -> values of each item
    embedding: np.ndarray | None = None  # float32 [I, D], the user's own (e.g. of images)

    def __len__(self) -> int:
        return len(self.ids)
