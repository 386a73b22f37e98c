"""Attention of one layer by the kernels of negfast.kernels, over packed rows as they come: no padding, no copies.

The parts are those of `padded_attention`, their eager reference.
"""

from torch import Tensor

from negfast.kernels.attention_inputs import Segments
from negfast.kernels.completion_attention import completion_attention as over_prompt_and_own
from negfast.kernels.varlen import causal_attention
from negfast.model.layout import GroupLayout, LayerKeys


def prompt_keys(layout: GroupLayout, key: Tensor, value: Tensor) -> LayerKeys:
    """The keys and values [T, Hk, D] of the packed prompts."""
    return LayerKeys([key], [value])


def prompt_attention(kept: LayerKeys, layout: GroupLayout, query: Tensor, scale: float) -> Tensor:
    """Causal attention of the packed prompts' queries [T, H, D]."""
    return causal_attention(query, kept.prompt_key[0], kept.prompt_value[0], _prompts(layout), scale)


def completion_attention(kept: LayerKeys, layout: GroupLayout, query: Tensor, scale: float) -> Tensor:
    """Attention of the completions' new tokens, query [C * n, H, D], over their prefix and their own tokens so far."""
    asked = layout.completions
    queries = query.unflatten(0, (len(asked), layout.new_tokens))
    tensors = queries, kept.prompt_key[0], kept.prompt_value[0], *kept.own()
    completions = Segments(layout.completion_offsets, asked.most)
    return over_prompt_and_own(*tensors, _prompts(layout), completions, asked.prefix, scale).flatten(0, 1)


def _prompts(layout: GroupLayout) -> Segments:
    return Segments(layout.cu_seqlens, layout.longest)
