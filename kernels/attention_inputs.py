"""What both attentions take: packed segments, and heads that the kernels know."""

from dataclasses import dataclass

import torch
from torch import Tensor

from negfast.kernels.dispatch import HEAD_DIMS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Segments:
    """B segments of a packed tensor: segment b holds its rows offsets[b] : offsets[b + 1].

    offsets  int32 [B + 1], from 0 to the number of rows
    longest  at least the rows of every segment; a number of the host, so that no launch waits for the device
    """

    offsets: Tensor
    longest: int

    @property
    def count(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> list[int]:
        """Rows of each segment; waits for the device."""
        return self.offsets.diff().tolist()


def check_heads(query: Tensor, key: Tensor) -> None:
    """Raise ValueError on a head dimension, dtype or ratio of heads that the kernels do not take."""
    if query.dtype not in DTYPES:
        raise ValueError(f"query: found {query.dtype}, expected bfloat16, float16 or float32")
    if query.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"head dimension: found {query.shape[-1]}, expected one of {HEAD_DIMS}")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(f"query heads: found {query.shape[-2]}, expected a multiple of the {key.shape[-2]} kv heads")
