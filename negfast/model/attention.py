"""Group attention: prompts attend causally to themselves, answers to their prompt and to their own earlier tokens.

The prompts' keys and values are read in place by all answers of a group, never copied per answer. Registered with
transformers' AttentionInterface under `NAME`, so stock decoders run unpatched; gradients flow through everything.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from negfast.model.layout import Bucket, GroupLayout, LayerKeys

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
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every decoder's attention has it
    if layout.keys_only:
        _keep_prompt_keys(layer, layout, key, value)
        return torch.zeros((), dtype=query.dtype, device=query.device).expand(1, *query.shape), None
    rows = layout.prompt_tokens if layout.holds_prompts else 0
    if layout.holds_prompts and layer in layout.keys:  # only the last rows of the prompts are here
        rows = 0 if layout.prompt_rows == "none" else layout.prompts
        if rows:
            outputs.append(_last_token_attention(layout.keys[layer], layout, query[:rows], scale))
    elif layout.holds_prompts:
        outputs.append(_prompt_attention(layer, layout, query[:rows], key[:rows], value[:rows], scale))
    if layout.new_tokens:
        kept = layout.keys[layer]
        outputs.append(_answer_attention(kept, layout, query[rows:], key[rows:], value[rows:], scale))
    return torch.cat(outputs).unsqueeze(0) if len(outputs) > 1 else outputs[0].unsqueeze(0), None


def _prompt_attention(
    layer: int, layout: GroupLayout, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Causal attention of the packed prompts [T, H, D]; leaves their keys and values in the layout.

    Padding lies to the right of every query that counts, so the causal mask alone hides it.
    """
    kept = _keep_prompt_keys(layer, layout, key, value)
    if layout.token_order is not None:
        query = query.index_select(0, layout.token_order)
    sizes = [bucket.tokens for bucket in layout.buckets]
    outputs = []
    for bucket, q, k, v in zip(layout.buckets, query.split(sizes), kept.prompt_key, kept.prompt_value, strict=True):
        out = F.scaled_dot_product_attention(_padded(q, bucket), k, v, is_causal=True, scale=scale, enable_gqa=True)
        out = out.transpose(1, 2).flatten(0, 1)
        outputs.append(out if bucket.unpad_index is None else out.index_select(0, bucket.unpad_index))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if layout.token_order is None:
        return out
    return torch.zeros_like(out).index_copy(0, layout.token_order, out)


def _keep_prompt_keys(layer: int, layout: GroupLayout, key: Tensor, value: Tensor) -> LayerKeys:
    """Leaves the keys and values [T, Hk, D] of the packed prompts in the layout, padded bucket by bucket."""
    if layout.token_order is not None:
        key, value = (x.index_select(0, layout.token_order) for x in (key, value))
    sizes = [bucket.tokens for bucket in layout.buckets]
    keys, values = (
        [_padded(rows, bucket) for rows, bucket in zip(x.split(sizes), layout.buckets, strict=True)]
        for x in (key, value)
    )
    kept = layout.keys[layer] = LayerKeys(keys, values)
    return kept


def _padded(rows: Tensor, bucket: Bucket) -> Tensor:
    """[t, H, D] -> [b, H, P, D]."""
    padded = rows if bucket.mask is None else rows.index_select(0, bucket.pad_index)
    return padded.unflatten(0, (bucket.prompts, bucket.longest)).transpose(1, 2)


def _last_token_attention(kept: LayerKeys, layout: GroupLayout, query: Tensor, scale: float) -> Tensor:
    """Attention of each prompt's last token, [B, H, D], over the whole prompt."""
    if layout.token_order is not None:
        query = torch.zeros_like(query).index_copy(0, layout.place, query)
    outputs = []
    sizes = [bucket.prompts for bucket in layout.buckets]
    for bucket, q, k, v in zip(layout.buckets, query.split(sizes), kept.prompt_key, kept.prompt_value, strict=True):
        mask = None if bucket.mask is None else bucket.mask[:, None, None]
        out = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out.squeeze(2))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if layout.token_order is None else out.index_select(0, layout.place)


def _answer_attention(
    kept: LayerKeys, layout: GroupLayout, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attention of the answers' new tokens, query [A * n, H, D], over their prompt and their own tokens so far."""
    answers, new, past = layout.answers, layout.new_tokens, layout.past_tokens
    heads, dim, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    repeat = heads // kv_heads
    own_key, own_value = key.unflatten(0, (answers, new)), value.unflatten(0, (answers, new))
    if kept.own_key is not None and kept.own_value is not None:
        own_key = torch.cat([kept.own_key, own_key], dim=1)
        own_value = torch.cat([kept.own_value, own_value], dim=1)
    kept.own_key, kept.own_value = own_key, own_value

    queries = (query * scale).view(answers, new, kv_heads, repeat, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    keys, values = own_key.transpose(1, 2), own_value.transpose(1, 2)  # [A, Hk, m, D]
    own = (queries.unsqueeze(-2) * keys.unsqueeze(2)).sum(-1)  # [A, Hk, rep * n, m]
    if new > 1:
        step = torch.arange(new, device=query.device).repeat(repeat)
        own = own.masked_fill(torch.arange(past + new, device=query.device) > (past + step)[:, None], -torch.inf)

    places = layout.grid_places()
    sizes = [bucket.prompts * cells for bucket, cells in zip(layout.buckets, layout.cells, strict=True)]
    outputs, own_weights = [], []
    parts = zip(
        layout.buckets,
        layout.cells,
        _to_grid(queries, layout, places).split(sizes),
        _to_grid(own, layout, places).split(sizes),
        kept.prompt_key,
        kept.prompt_value,
        strict=True,
    )
    for bucket, cells, q, own_scores, prompt_key, prompt_value in parts:
        # all queries of a kv head and group side by side, [b, Hk, G * rep * n, D], against the prompt's [b, Hk, P, D]
        q, own_scores = (_side_by_side(x, bucket.prompts) for x in (q, own_scores))
        scores = q @ prompt_key.transpose(-1, -2)
        if bucket.mask is not None:
            scores = scores.masked_fill(~bucket.mask[:, None, None, :], -torch.inf)
        weights = torch.softmax(torch.cat([scores, own_scores], dim=-1), dim=-1, dtype=_softmax_dtype(query))
        weights = weights.to(query.dtype)
        outputs.append(_answer_by_answer(weights[..., : bucket.longest] @ prompt_value, cells))
        own_weights.append(_answer_by_answer(weights[..., bucket.longest :], cells))
    out = _from_grid(outputs, places) + (_from_grid(own_weights, places).unsqueeze(-1) * values.unsqueeze(2)).sum(-2)
    return out.view(answers, kv_heads, repeat, new, dim).permute(0, 3, 1, 2, 4).reshape(answers * new, heads, dim)


def _to_grid(rows: Tensor, layout: GroupLayout, places: Tensor | None) -> Tensor:
    """[A, ...] -> [cells of all buckets, ...]; places without an answer hold zeros."""
    if places is None:
        return rows
    return rows.new_zeros(layout.grid_size, *rows.shape[1:]).index_copy(0, places, rows)


def _from_grid(parts: list[Tensor], places: Tensor | None) -> Tensor:
    """[b * G, ...] of every bucket -> [A, ...]."""
    grid = parts[0] if len(parts) == 1 else torch.cat(parts)
    return grid if places is None else grid.index_select(0, places)


def _side_by_side(grid: Tensor, prompts: int) -> Tensor:
    """[b * G, Hk, q, X] -> [b, Hk, G * q, X]."""
    return grid.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)


def _answer_by_answer(grid: Tensor, cells: int) -> Tensor:
    """[b, Hk, G * q, X] -> [b * G, Hk, q, X]."""
    return grid.unflatten(2, (cells, -1)).transpose(1, 2).flatten(0, 1)


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def drop_prompt_rows(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a decoder's last layer: of the prompts only the rows that the caller wants go through it.

    Nobody attends to what this layer makes of the others; they give it their keys and values and are dropped. Holds for
    layers whose attention reads ``input_layernorm`` of their input, see `Policy`.
    """
    layout: GroupLayout | None = kwargs.get("layout")
    if layout is None or not layout.holds_prompts or layout.prompt_rows == "all":
        return None
    hidden, tokens = args[0], layout.prompt_tokens
    prompts = slice(0, tokens)
    cos, sin = kwargs["position_embeddings"]
    layout.keys_only = True
    layer.self_attn(  # type: ignore[operator]
        hidden_states=layer.input_layernorm(hidden[:, prompts]),  # type: ignore[operator]
        position_embeddings=(cos[:, prompts], sin[:, prompts]),
        attention_mask=None,
        layout=layout,
    )
    layout.keys_only = False
    rows = torch.arange(tokens, hidden.shape[1], device=hidden.device)
    if layout.prompt_rows == "last":
        rows = torch.cat([layout.last_prompt_row, rows])
    position_ids = kwargs["position_ids"]
    selected = {
        "position_embeddings": (cos[:, rows], sin[:, rows]),
        "position_ids": None if position_ids is None else position_ids[:, rows],
    }
    return (hidden[:, rows], *args[1:]), kwargs | selected


AttentionInterface.register(NAME, group_attention)
