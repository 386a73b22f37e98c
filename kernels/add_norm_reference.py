"""The formula of add_norm.py in eager code."""

import torch
from torch import Tensor


def add_norm_reference(
    stream: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(sum, normed) as `add_norm` gives them; float64 where ``stream`` is."""
    total = stream if branch is None else (stream + branch).to(stream.dtype)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    return total, (weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(dtype)
