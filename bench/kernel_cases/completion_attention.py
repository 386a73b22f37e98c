"""Cases of attention of completions over their shared prompts, or prefixes of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.kernel_cases.case import Case, attention_systems, compiled
from negfast.kernels.completion_attention import completion_attention
from tests.kernels import cases as inputs


def completion_attention_case(
    prompts: int,
    group: int,
    length: int,
    new: int,
    heads: int,
    kv_heads: int,
    dim: int,
    backward: bool,
    prefix: str = "full",
) -> Case:
    """G completions of ``new`` tokens a prompt, all asked at once; ``new`` = 1 is the decode step.

    ``prefix``: "full", or "spread" evenly over the prompt, as requests over a history are.
    """
    shown = inputs.prefixes(prefix, length, group, np.random.default_rng(4))  # of every prompt

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        dtype, lengths = torch.bfloat16, (length,) * prompts
        sizes: dict[str, Any] = {"group": group, "new": new, "seen": new, "prefix": prefix}
        data = inputs.attention_case(4, device, lengths, heads, kv_heads, dim, **sizes, dtype=dtype).completions()

        token = torch.arange(length + new, device=device)
        prompt_part = token < data.layout[2][:, None, None]
        own_part = (token >= length) & (token <= length + torch.arange(new, device=device)[:, None])
        seen = (prompt_part | own_part)[:, None]  # [C, 1, n, P + n]

        def copied(q: Tensor, *keys: Tensor) -> Tensor:
            """As libraries without groups hold it: the prompt's keys and values once a completion."""
            prompt = (x.unflatten(0, (prompts, 1, length)).expand(-1, group, -1, -1, -1) for x in keys[:2])
            k, v = (
                torch.cat([p.flatten(0, 1), own], 1).transpose(1, 2) for p, own in zip(prompt, keys[2:], strict=True)
            )
            q = q.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2).view(data.grad.shape)

        reach = torch.from_numpy(shown).to(device)

        def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            own = j - length
            return (j < reach[i // new]) | ((own >= 0) & (own // new == i // new) & (own % new <= i % new))

        mask = create_block_mask(visible, None, None, group * new, length + group * new, device=str(device))
        flex = compiled(flex_attention)

        def shared(q: Tensor, *keys: Tensor) -> Tensor:
            prompt = (x.unflatten(0, (prompts, length)) for x in keys[:2])
            k, v = (
                torch.cat([p, own.reshape(prompts, group * new, kv_heads, dim)], 1).transpose(1, 2)
                for p, own in zip(prompt, keys[2:], strict=True)
            )
            out = flex(
                q.reshape(prompts, group * new, heads, dim).transpose(1, 2), k, v, block_mask=mask, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(data.grad.shape)

        calls = {
            "negfast": lambda *tensors: completion_attention(*tensors, *data.layout),
            "sdpa, prompt copied per completion": copied,
        }
        if device.type == "cuda" or not backward:  # FlexAttention has no backward on the CPU
            calls["flex attention"] = shared
        return attention_systems(calls, data, backward)

    queries = prompts * group * new * heads * dim
    prompt_keys = 2 * prompts * length * kv_heads * dim
    own_keys = 2 * prompts * group * new * kv_heads * dim
    elements = 2 * queries + prompt_keys + own_keys
    if backward:
        elements += 4 * queries + 2 * (prompt_keys + own_keys)
    flops = (2 if not backward else 7) * 2 * prompts * new * heads * dim * int(shown.sum())
    shape: dict[str, Any] = {
        "prompts": prompts,
        "group": group,
        "length": length,
        "new": new,
        "prefix": prefix,
        "heads": heads,
        "kv_heads": kv_heads,
    }
    shape |= {"dim": dim, "pass": "forward + backward" if backward else "forward"}
    return Case("completion_attention", shape, elements * 2, flops, build)
