"""Attention of completions over a prefix of their shared prompt and their own tokens, in eager code."""

import torch
from torch import Tensor

from negfast.kernels.attention_inputs import Segments


def completion_attention_reference(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    prompts: Segments,
    completions: Segments,
    prefix: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Differentiable, in any dtype, a prompt at a time; arguments as in ``completion_attention``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    new, heads = query.shape[1:3]
    seen, kv_heads = own_key.shape[1:3]
    repeat = heads // kv_heads
    future = torch.arange(seen, device=query.device) > seen - new + torch.arange(new, device=query.device)[:, None]
    lengths, groups = prompts.lengths(), completions.lengths()
    shared = zip(prompt_key.split(lengths), prompt_value.split(lengths), strict=True)
    asked = zip(*(x.split(groups) for x in (query, prefix, own_key, own_value)), strict=True)
    outputs = []
    for prompt, (q, visible, *own) in zip(shared, asked, strict=True):
        k, v = (torch.cat([p.expand(len(q), -1, -1, -1), o], 1) for p, o in zip(prompt, own, strict=True))
        k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))  # [G, P + m, H, D]
        scores = torch.einsum("gihd,gjhd->ghij", q, k) * scale
        beyond = torch.arange(len(prompt[0]), device=query.device) >= visible[:, None, None]  # [G, 1, P]
        hidden = torch.cat([x.expand(len(q), new, -1) for x in (beyond, future)], 2)[:, None]
        dtype = torch.promote_types(q.dtype, torch.float32)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=dtype).to(q.dtype)
        outputs.append(torch.einsum("ghij,gjhd->gihd", weights, v))
    return torch.cat(outputs)
