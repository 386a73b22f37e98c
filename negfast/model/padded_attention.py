"""Attention of one layer in eager code: the prompts in buckets of similar length, each padded to its longest.

What computes on the CPU, and what `packed_attention` is held against. A layer's attention is `prompt_keys`, then
`prompt_attention` or `last_token_attention` of the prompts and `completion_attention` of their completions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from negfast.model.layout import Bucket, GroupLayout, LayerKeys


def prompt_keys(layout: GroupLayout, key: Tensor, value: Tensor) -> LayerKeys:
    """The keys and values [T, Hk, D] of the packed prompts, padded bucket by bucket."""
    if layout.token_order is not None:
        key, value = (x.index_select(0, layout.token_order) for x in (key, value))
    sizes = [bucket.tokens for bucket in layout.buckets]
    keys, values = (
        [_padded(rows, bucket) for rows, bucket in zip(x.split(sizes), layout.buckets, strict=True)]
        for x in (key, value)
    )
    return LayerKeys(keys, values)


def prompt_attention(kept: LayerKeys, layout: GroupLayout, query: Tensor, scale: float) -> Tensor:
    """Causal attention of the packed prompts' queries [T, H, D].

    Padding lies to the right of every query that counts, so the causal mask alone hides it.
    """
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


def _padded(rows: Tensor, bucket: Bucket) -> Tensor:
    """[t, H, D] -> [b, H, P, D]."""
    padded = rows if bucket.mask is None else rows.index_select(0, bucket.pad_index)
    return padded.unflatten(0, (bucket.prompts, bucket.longest)).transpose(1, 2)


def last_token_attention(kept: LayerKeys, layout: GroupLayout, query: Tensor, scale: float) -> Tensor:
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


def completion_attention(kept: LayerKeys, layout: GroupLayout, query: Tensor, scale: float) -> Tensor:
    """Attention of the completions' new tokens, query [C * n, H, D], over their prompt and their own tokens so far."""
    count, new, past = layout.completions, layout.new_tokens, layout.past_tokens
    own_key, own_value = kept.own()
    heads, dim, kv_heads = query.shape[1], query.shape[2], own_key.shape[2]
    repeat = heads // kv_heads
    queries = (query * scale).view(count, new, kv_heads, repeat, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    keys, values = own_key.transpose(1, 2), own_value.transpose(1, 2)  # [C, Hk, m, D]
    own = (queries.unsqueeze(-2) * keys.unsqueeze(2)).sum(-1)  # [C, Hk, rep * n, m]
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
        outputs.append(_apart(weights[..., : bucket.longest] @ prompt_value, cells))
        own_weights.append(_apart(weights[..., bucket.longest :], cells))
    out = _from_grid(outputs, places) + (_from_grid(own_weights, places).unsqueeze(-1) * values.unsqueeze(2)).sum(-2)
    return out.view(count, kv_heads, repeat, new, dim).permute(0, 3, 1, 2, 4).reshape(count * new, heads, dim)


def _to_grid(rows: Tensor, layout: GroupLayout, places: Tensor | None) -> Tensor:
    """[C, ...] -> [cells of all buckets, ...]; places without a completion hold zeros."""
    if places is None:
        return rows
    return rows.new_zeros(layout.grid_size, *rows.shape[1:]).index_copy(0, places, rows)


def _from_grid(parts: list[Tensor], places: Tensor | None) -> Tensor:
    """[b * G, ...] of every bucket -> [C, ...]."""
    grid = parts[0] if len(parts) == 1 else torch.cat(parts)
    return grid if places is None else grid.index_select(0, places)


def _side_by_side(grid: Tensor, prompts: int) -> Tensor:
    """[b * G, Hk, q, X] -> [b, Hk, G * q, X]."""
    return grid.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)


def _apart(grid: Tensor, cells: int) -> Tensor:
    """[b, Hk, G * q, X] -> [b * G, Hk, q, X]."""
    return grid.unflatten(2, (cells, -1)).transpose(1, 2).flatten(0, 1)


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
