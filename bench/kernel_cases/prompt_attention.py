"""Cases of causal attention of packed prompts."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_cases.case import Case, attention_systems
from negfast.kernels.prompt_attention import prompt_attention
from tests.kernels import cases as inputs


def prompt_attention_case(prompts: int, length: int, heads: int, kv_heads: int, dim: int, backward: bool) -> Case:
    """Causal attention of equally long prompts, as padded peers like them best."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        dtype = torch.bfloat16
        data = inputs.attention_case(3, device, (length,) * prompts, heads, kv_heads, dim, dtype=dtype).prompts()

        def padded(x: Tensor) -> Tensor:
            return x.unflatten(0, (prompts, length)).transpose(1, 2)

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(padded(q), padded(k), padded(v), is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        calls: dict[str, Callable[..., Tensor]] = {
            "negfast": lambda q, k, v: prompt_attention(q, k, v, *data.layout),
            "sdpa": sdpa,
        }
        if device.type == "cuda" and find_spec("flash_attn"):
            from flash_attn import flash_attn_varlen_func

            offsets = data.layout[0].offsets
            calls["flash-attn"] = lambda q, k, v: flash_attn_varlen_func(
                q, k, v, offsets, offsets, length, length, causal=True
            )
        return attention_systems(calls, data, backward)

    products = 2 if not backward else 2 + 5
    flops = products * 2 * heads * dim * prompts * length * (length + 1) // 2
    tensors = (2 if not backward else 5) * prompts * length * (heads + kv_heads) * dim
    shape: dict[str, Any] = {"prompts": prompts, "length": length, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    shape["pass"] = "forward + backward" if backward else "forward"
    return Case("prompt_attention", shape, tensors * 2, flops, build)
