"""The built-in decoder and the verdict on the CPU without gradients, by the C++ core: what serving and
evaluation compute, within `torch.inference_mode`.

What a row gets does not depend on the rows that are computed beside it, to the bit. The decoder's products are of
bfloat16 numbers, summed in float32, where the CPU multiplies these; else of float32.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfast import _core
from negfast.model.layout import GroupLayout, LayerKeys
from negfast.model.qwen3 import EXPECTED

MOST_NUMBERS = 1 << 24  # in the layers of a decoder that the core takes: they are copied (negfast's choice)
NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")
PRODUCTS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))


T = TypeVar("T")


class Packed(Generic[T]):
    """What the core made of a module's tensors. It is made again when they change; a copy of the module starts anew."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make = make
        self.tensors: list[Tensor] = []
        self.version: list[tuple[int, int]] = []

    def of(self, module: nn.Module) -> T:
        if not self.tensors or self.version != self._version():
            self.tensors = [*module.parameters(), *module.buffers()]
            self.made, self.version = self.make(module), self._version()
        return self.made

    def _version(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self.tensors]

    def __deepcopy__(self, memo: dict) -> "Packed[T]":
        return Packed(self.make)


class Inference:
    """A decoder's layers in the core."""

    @classmethod
    def of(cls, decoder: Any) -> "Inference | None":
        """None for a decoder of another kind than `negfast.model.qwen3`, of another type than float32, or too large."""
        config, layers = decoder.config, list(decoder.layers)
        rope = getattr(config, "rope_parameters", None) or {}
        if any(getattr(config, name, None) != expected for name, expected in EXPECTED.items()):
            return None
        tensors = [tensor for layer in layers for tensor in layer.parameters()]
        is_plain = all(type(layer.get_submodule(name)) is nn.Linear for layer in layers for name in PRODUCTS)
        on_cpu = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        fits = rope.get("rope_type") == "default" and sum(map(torch.numel, tensors)) <= MOST_NUMBERS
        return cls(decoder) if is_plain and on_cpu and fits else None

    def __init__(self, decoder: Any) -> None:
        config, self.final_norm = decoder.config, array(decoder.norm.weight)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        sizes = config.hidden_size, self.heads, self.kv_heads, self.head_dim, config.intermediate_size
        self.core = _core.Decoder(*sizes, config.rms_norm_eps, _core.HAS_BFLOAT16)
        for layer in decoder.layers:
            before, query_norm, key_norm, after = (array(layer.get_submodule(name).weight) for name in NORMS)
            query, key, value, out, gate, up, down = (array(layer.get_submodule(name).weight) for name in PRODUCTS)
            self.core.add_layer(before, query, key, value, query_norm, key_norm, out, after, gate, up, down)
        self.layers = len(decoder.layers)
        power = torch.arange(0, self.head_dim, 2, dtype=torch.float) / self.head_dim
        self.frequency = (1.0 / (config.rope_parameters["rope_theta"] ** power)).numpy()

    def hidden(self, layout: GroupLayout, inputs: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states of a call of `Policy.hidden`, of inputs [N, d], which it overwrites, at positions [N]."""
        threads, hidden = torch.get_num_threads(), inputs.numpy()
        angle = positions.numpy().astype(np.float32)[:, None] * self.frequency
        cos, sin = np.cos(angle), np.sin(angle)
        prompts = layout.prompt_tokens if layout.holds_prompts else 0
        offsets = layout.cu_seqlens.numpy()
        if prompts:  # a prompt's token is a completion of the tokens up to it
            prefix = (layout.positions.numpy() + 1).astype(np.int32)
            of_prompts = np.repeat(np.arange(layout.prompts), layout.host_lengths), prefix
        if layout.new_tokens:
            asked = layout.completions
            of_completions = asked.prompt.numpy(), asked.prefix.numpy()
        rows = len(hidden)
        query, attention = np.empty((2, rows, self.heads, self.head_dim), np.float32)
        for number in range(self.layers):
            key, value = np.empty((2, rows, self.kv_heads, self.head_dim), np.float32)
            self.core.project(number, hidden, cos, sin, query, key, value, threads)
            if prompts:
                layout.keys[number] = LayerKeys([torch.from_numpy(key[:prompts])], [torch.from_numpy(value[:prompts])])
            kept = layout.keys[number]
            keys = kept.prompt_key[0].numpy(), kept.prompt_value[0].numpy(), offsets
            first = prompts if layout.new_tokens and number == self.layers - 1 else 0  # nobody reads the prompts' last
            if prompts > first:
                none = np.empty((0, self.kv_heads, self.head_dim), np.float32)
                self.core.attend(query[:prompts], *keys, *of_prompts, none, none, attention[:prompts], threads)
            if layout.new_tokens:
                by_completion = len(asked), layout.new_tokens
                kept.append_own(*(torch.from_numpy(x[prompts:]).unflatten(0, by_completion) for x in (key, value)))
                own_key, own_value = (x.flatten(0, 1).numpy() for x in kept.own())
                out = attention[prompts:]
                self.core.attend(query[prompts:], *keys, *of_completions, own_key, own_value, out, threads)
            hidden = hidden[first:]
            self.core.finish(number, attention[first:], hidden, threads)
        self.core.norm(self.final_norm, hidden)
        return torch.from_numpy(hidden)


def array(tensor: Tensor) -> np.ndarray:
    """For the core, which reads contiguous arrays."""
    return np.ascontiguousarray(tensor.detach().numpy())


def summed_rows(table: Tensor, places: Tensor, none: int) -> Tensor:
    """Sums [N, d] of the rows of ``table`` [R, d] at ``places`` int64 [N, S], those at ``none`` left out."""
    if not torch.is_inference_mode_enabled() or table.device.type != "cpu" or table.dtype != torch.float32:
        return F.embedding_bag(places, table, mode="sum", padding_idx=none)
    out = torch.empty(len(places), table.shape[1])
    _core.sum_rows(array(table), array(places), none, out.numpy())
    return out
