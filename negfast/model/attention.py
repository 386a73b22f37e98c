"""Group attention: prompts attend causally to themselves, completions to their prefix and their own earlier tokens.

All completions of a prompt read its keys and values in place; nothing is copied per completion. `install`
registers it with transformers' AttentionInterface under `NAME`, so stock decoders run unpatched; gradients flow through
everything.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from negfast.kernels.dispatch import attention_runs_triton
from negfast.model import packed_attention, padded_attention
from negfast.model.layout import GroupLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "negfast_group"


def group_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: GroupLayout | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one layer over packed rows; query [1, H, N, D], key and value [1, Hk, N, D] -> [1, N, H, D].

    Raises ValueError where the layer wants what the layout cannot give: a sliding window, dropout, a mask.
    """
    if layout is None:
        raise ValueError(f"attention '{NAME}' needs layout=GroupLayout in the call of the model")
    if sliding_window is not None:
        raise ValueError("sliding-window layers do not fit the group layout")
    if dropout or attention_mask is not None:
        raise ValueError("the group layout takes neither attention dropout nor an attention mask")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [N, H, D]

    if torch.is_autocast_enabled(query.device.type):  # norms of queries and keys leave it; kernels want one dtype
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    parts = packed_attention if attention_runs_triton(query) else padded_attention
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every decoder's attention has it
    if layout.keys_only:
        layout.keys[layer] = parts.prompt_keys(layout, key, value)
        return torch.zeros((), dtype=query.dtype, device=query.device).expand(1, *query.shape), None
    outputs = []
    if layout.holds_prompts and layer not in layout.keys:  # else the last layer dropped the prompts' rows
        prompts = query, key, value
        if layout.new_tokens:  # split, not sliced: the backward joins the parts by one copy
            sizes = [layout.prompt_tokens, query.shape[0] - layout.prompt_tokens]
            prompts, (query, key, value) = zip(*(x.split(sizes) for x in prompts), strict=True)
        kept = layout.keys[layer] = parts.prompt_keys(layout, prompts[1], prompts[2])
        outputs.append(parts.prompt_attention(kept, layout, prompts[0], scale))
    if layout.new_tokens:
        kept = layout.keys[layer]
        kept.append_own(*(x.unflatten(0, (len(layout.completions), layout.new_tokens)) for x in (key, value)))
        outputs.append(parts.completion_attention(kept, layout, query, scale))
    return torch.cat(outputs).unsqueeze(0) if len(outputs) > 1 else outputs[0].unsqueeze(0), None


def drop_prompt_rows(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a decoder's last layer: where completions are asked about, their rows alone go through it.

    Nobody attends to what this layer makes of the prompts; they give it their keys and values and are dropped. Holds
    for layers whose attention reads ``input_layernorm`` of their input, see `Policy`.
    """
    layout: GroupLayout | None = kwargs.get("layout")
    if layout is None or not layout.holds_prompts or not layout.new_tokens:
        return None
    hidden, tokens = args[0], layout.prompt_tokens
    cos, sin = kwargs["position_embeddings"]
    layout.keys_only = True
    normed = layer.input_layernorm(_rows(hidden, slice(tokens)))  # type: ignore[operator]
    layer.self_attn(  # type: ignore[operator]
        hidden_states=normed if isinstance(normed, Tensor) else normed[1],  # of a fused norm the sum comes first
        position_embeddings=(cos[:, :tokens], sin[:, :tokens]),
        attention_mask=None,
        layout=layout,
    )
    layout.keys_only = False
    position_ids = kwargs["position_ids"]
    selected = {
        "position_embeddings": (cos[:, tokens:], sin[:, tokens:]),
        "position_ids": None if position_ids is None else position_ids[:, tokens:],
    }
    return (_rows(hidden, slice(tokens, None)), *args[1:]), kwargs | selected


def _rows(hidden: Any, rows: slice) -> Any:
    """Rows of hidden states [1, N, d], of each part where an addition is yet to be made."""
    return hidden[:, rows] if isinstance(hidden, Tensor) else type(hidden)(*(part[:, rows] for part in hidden))


def install(model: "PreTrainedModel") -> None:
    """Makes a transformers model compute its attention by `group_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, group_attention)
    model.set_attn_implementation(NAME)
