"""Causal attention of packed prompts in eager code."""

import torch
from torch import Tensor

from negfast.kernels.attention_inputs import Segments


def prompt_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, prompts: Segments, scale: float | None = None
) -> Tensor:
    """Differentiable, in any dtype, a prompt at a time; shapes as in ``prompt_attention``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    repeat = query.shape[1] // key.shape[1]
    lengths, dtype = prompts.lengths(), torch.promote_types(query.dtype, torch.float32)
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=dtype).to(q.dtype)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v))
    return torch.cat(outputs)
