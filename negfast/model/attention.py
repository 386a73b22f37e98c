"""Group attention: prompts attend causally to themselves, answers to their prompt and to their own earlier tokens.

The prompts' keys and values are read in place by all answers of a group, never copied per answer. Registered with
transformers' AttentionInterface under `NAME`, so stock decoders run unpatched; gradients flow through everything.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from negfast.model.layout import GroupLayout, LayerKeys

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
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]

    outputs = []
    prompt_rows = layout.unpad_index.shape[0] if layout.holds_prompts else 0
    if layout.holds_prompts:
        outputs.append(_prompt_attention(module.layer_idx, layout, query, key, value, prompt_rows, scale))
    if layout.new_tokens:
        answers = (x[prompt_rows:] for x in (query, key, value))
        outputs.append(_answer_attention(layout.keys[module.layer_idx], layout, *answers, scale))
    return torch.cat(outputs).unsqueeze(0) if len(outputs) > 1 else outputs[0].unsqueeze(0), None


def _prompt_attention(
    layer: int, layout: GroupLayout, query: Tensor, key: Tensor, value: Tensor, rows: int, scale: float
) -> Tensor:
    """Causal attention of the packed prompts [T, H, D]; leaves their padded keys and values in the layout.

    Padding lies to the right of every query that counts, so the causal mask alone hides it.
    """
    if rows == layout.pad_index.numel():  # equal lengths: the grid is a view
        grid = (layout.prompts, layout.pad_index.shape[1])
        padded = [x[:rows].unflatten(0, grid).transpose(1, 2) for x in (query, key, value)]
    else:
        padded = [x[:rows][layout.pad_index].transpose(1, 2) for x in (query, key, value)]
    layout.keys[layer] = LayerKeys(padded[1], padded[2])
    out = F.scaled_dot_product_attention(*padded, is_causal=True, scale=scale, enable_gqa=True)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if rows == layout.pad_index.numel() else out[layout.unpad_index]


def _answer_attention(
    kept: LayerKeys, layout: GroupLayout, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attention of the answers' new tokens, query [A * n, H, D], over their prompt and their own tokens so far."""
    answers, new, past = layout.answers, layout.new_tokens, layout.past_tokens
    heads, dim, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    own_key, own_value = key.unflatten(0, (answers, new)), value.unflatten(0, (answers, new))
    if kept.own_key is not None and kept.own_value is not None:
        own_key = torch.cat([kept.own_key, own_key], dim=1)
        own_value = torch.cat([kept.own_value, own_value], dim=1)
    kept.own_key, kept.own_value = own_key, own_value

    # all queries of a kv head and group side by side: [B, Hk, G * rep * n, D] against the prompt's [B, Hk, P, D]
    queries = query.unflatten(0, (answers, new)).unflatten(2, (kv_heads, heads // kv_heads)) * scale
    queries = queries.permute(0, 2, 3, 1, 4)  # [A, Hk, rep, n, D]
    grid = _to_grid(queries.flatten(2, 3), layout)  # [B, G, Hk, rep * n, D]
    grid = grid.transpose(1, 2).flatten(2, 3)
    over_prompt = grid @ kept.prompt_key.transpose(-1, -2)  # [B, Hk, G * rep * n, P]
    over_prompt = over_prompt.masked_fill(~layout.prompt_mask[:, None, None, :], -torch.inf)

    keys, values = own_key.transpose(1, 2), own_value.transpose(1, 2)  # [A, Hk, m, D]
    over_own = (queries.flatten(2, 3).unsqueeze(-2) * keys.unsqueeze(2)).sum(-1)  # [A, Hk, rep * n, m]
    if new > 1:
        step = torch.arange(new, device=query.device).repeat(heads // kv_heads)
        future = torch.arange(past + new, device=query.device) > (past + step)[:, None]
        over_own = over_own.masked_fill(future, -torch.inf)
    own_grid = _to_grid(over_own, layout).transpose(1, 2).flatten(2, 3)

    weights = torch.softmax(torch.cat([over_prompt, own_grid], dim=-1), dim=-1, dtype=_softmax_dtype(query))
    weights = weights.to(query.dtype)
    longest = layout.prompt_mask.shape[1]
    out = weights[..., :longest] @ kept.prompt_value  # [B, Hk, G * rep * n, D]
    out = _from_grid(out, layout)  # [A, Hk, rep * n, D]
    own_weights = _from_grid(weights[..., longest:], layout)
    out = out + (own_weights.unsqueeze(-1) * values.unsqueeze(2)).sum(-2)
    return out.unflatten(2, (-1, new)).permute(0, 3, 1, 2, 4).reshape(answers * new, heads, dim)


def _to_grid(rows: Tensor, layout: GroupLayout) -> Tensor:
    """[A, ...] -> [B, G, ...]; places without an answer hold zeros."""
    places = layout.prompts * layout.group
    if layout.answers != places:
        rows = rows.new_zeros(places, *rows.shape[1:]).index_copy(0, layout.slots, rows)
    return rows.unflatten(0, (layout.prompts, layout.group))


def _from_grid(grid: Tensor, layout: GroupLayout) -> Tensor:
    """[B, Hk, G * q, X] -> [A, Hk, q, X]."""
    rows = grid.unflatten(2, (layout.group, -1)).transpose(1, 2).flatten(0, 1)
    return rows if layout.answers == layout.prompts * layout.group else rows[layout.slots]


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


AttentionInterface.register(NAME, group_attention)
