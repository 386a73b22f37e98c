"""Qwen3 for serving: transformers' own layers cost 3.5 seconds of imports, more than all else that `score` does.

The same operations in the same order as transformers' Qwen3Model, so that hidden states are the same to the bit, and
the same names of parameters, so that checkpoints fit. It has what the built-in model has (`negfast.config.Model`): no
biases, no sliding window, SwiGLU by SiLU, rotary embedding of the default kind.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfast.model.attention import group_attention
from negfast.model.layout import GroupLayout

EXPECTED = {"model_type": "qwen3", "attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}


def read_config(folder: Path) -> Any | None:
    """The configuration in a run's model folder, or None where its decoder is not what this file computes."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rope = config.get("rope_parameters") or {}
    if any(config.get(key) != value for key, value in EXPECTED.items()) or rope.get("rope_type") != "default":
        return None
    if set(config["layer_types"]) != {"full_attention"} or not config["tie_word_embeddings"]:
        return None
    return SimpleNamespace(**config)


class Norm(nn.Module):
    """RMSNorm over the last dimension, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Grouped-query attention over a group layout, queries and keys normalised by head."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer, config.head_dim
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (Norm(config.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: GroupLayout, **_: Any
    ) -> Tensor:
        """Of hidden states [1, N, d] at rotations cos and sin [1, N, D]."""
        by_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(by_head)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(by_head)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
        out, _none = group_attention(self, query, key, value, None, self.head_dim**-0.5, layout=layout)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous())


class Layer(nn.Module):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), Mlp(config)
        self.input_layernorm, self.post_attention_layernorm = (
            Norm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), **options)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """The decoder, and of a causal LM what `negfast.model.policy.Policy` asks: its head is the input embedding."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        power = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        self.inv_freq = nn.Buffer(1.0 / (config.rope_parameters["rope_theta"] ** power), persistent=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def output_embeddings(self) -> nn.Linear:
        """The head, whose rows are the input embedding's."""
        head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False, device="meta")
        head.weight = self.embed_tokens.weight
        return head

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, use_cache: bool, layout: GroupLayout
    ) -> SimpleNamespace:
        """``last_hidden_state`` [1, N, d] of inputs [1, N, d] at positions [1, N]."""
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        turned = angles.cos().to(inputs_embeds.dtype), angles.sin().to(inputs_embeds.dtype)
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, position_embeddings=turned, position_ids=position_ids, layout=layout)
        return SimpleNamespace(last_hidden_state=self.norm(x))


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1), halves of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
