"""Attention of one layer by PyTorch: the prompts in buckets of similar length, each padded to its longest.

What computes on the CPU, and what `packed_attention` is held against. A layer's attention is `prompt_keys`, then
`prompt_attention` of the prompts and `completion_attention` of their completions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from negfast.model.layout import Bucket, Completions, GroupLayout, LayerKeys

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    padded = rows if bucket.pad_index is None else rows.index_select(0, bucket.pad_index)
    return padded.unflatten(0, (bucket.prompts, bucket.longest)).transpose(1, 2)


def completion_attention(kept: LayerKeys, layout: GroupLayout, query: Tensor, scale: float) -> Tensor:
    """Attention of the completions' new tokens, query [C * n, H, D], over their prefix and their own tokens so far."""
    own_key, own_value = kept.own()
    count, new, kv_heads = len(layout.completions), layout.new_tokens, own_key.shape[2]
    # all queries of a kv head and completion together, [C, Hk, rep * n, D]
    queries = query.unflatten(0, (count, new)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    own = (x.transpose(1, 2) for x in (own_key, own_value))  # [C, Hk, m, D]
    with torch.autocast(query.device.type, enabled=False):  # whose sums on CUDA are float32, which no backward expects
        out = OverPrefixAndOwn.apply(layout, scale, queries, *own, *kept.prompt_key, *kept.prompt_value)
    return out.unflatten(2, (-1, new)).permute(0, 3, 1, 2, 4).reshape(query.shape)


class OverPrefixAndOwn(torch.autograd.Function):
    """Queries [C, Hk, rep * n, D] over their own keys [C, Hk, m, D] and the prefixes of the buckets' [b, Hk, P, D].

    As in the kernels, attention over the prefix and over own tokens is merged by log-sum-exp, and the backward of each
    part is its own with the merged output and log-sum-exp.
    """

    @staticmethod
    def forward(ctx: Any, layout: GroupLayout, scale: float, query: Tensor, *tensors: Tensor) -> Tensor:
        own_key, own_value, *prompts = tensors
        ctx.completions, ctx.new, ctx.scale = layout.completions, layout.new_tokens, scale
        ctx.tiles = layout.tiles(query.shape[2], query.dtype)
        outputs, sums = [], []
        for grid, tiles, k, v in zip(_to_grid(query, ctx.completions), ctx.tiles, *_halves(prompts), strict=True):
            q = _side_by_side(grid, len(k))
            parts = [_attend(q[:, :, t.queries], k[:, :, : t.keys], v[:, :, : t.keys], t.mask, scale) for t in tiles]
            out, lse = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
            outputs.append(_apart(out, len(grid)))
            sums.append(_apart(lse.unsqueeze(-1), len(grid)))
        prefix, prefix_lse = (_from_grid(parts, ctx.completions) for parts in (outputs, sums))
        prefix_lse = prefix_lse.masked_fill((ctx.completions.prefix == 0)[:, None, None, None], -torch.inf)
        scores = _own_scores(query, own_key, scale, ctx.new).to(prefix_lse.dtype)
        lse = torch.logaddexp(prefix_lse, scores.logsumexp(-1, keepdim=True))
        of_prefix, of_own = ((x - lse).exp().to(query.dtype) for x in (prefix_lse, scores))
        out = of_prefix * prefix + _weighted(of_own, own_value)
        ctx.save_for_backward(query, own_key, own_value, out, lse, *prompts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, own_key, own_value, out, lse, *prompts = ctx.saved_tensors
        weights = (_own_scores(query, own_key, ctx.scale, ctx.new).to(lse.dtype) - lse).exp().to(query.dtype)
        of_values = (grad.unsqueeze(-2) * own_value.unsqueeze(2)).sum(-1)
        score_grad = weights * (of_values - (grad * out).sum(-1, keepdim=True)) * ctx.scale
        dq, dk, dv = [], [], []
        grids = zip(*(_to_grid(x, ctx.completions) for x in (grad, query, out, lse)), strict=True)
        for cells, tiles, k, v in zip(grids, ctx.tiles, *_halves(prompts), strict=True):
            sides, of_tiles = [_side_by_side(x, len(k)) for x in cells], []
            dk.append(torch.zeros_like(k))
            dv.append(torch.zeros_like(v))
            for tile in tiles:
                g, q, o, merged = (x[:, :, tile.queries] for x in sides)
                seen = k[:, :, : tile.keys], v[:, :, : tile.keys]
                gradients = _attend_backward(g, q, *seen, o, merged.squeeze(-1), tile.mask, ctx.scale)
                of_tiles.append(gradients[0])
                dk[-1][:, :, : tile.keys] += gradients[1]
                dv[-1][:, :, : tile.keys] += gradients[2]
            dq.append(_apart(torch.cat(of_tiles, dim=2), len(cells[0])))
        query_grad = _from_grid(dq, ctx.completions) + _weighted(score_grad, own_key)
        own = _weighted(score_grad.transpose(2, 3), query), _weighted(weights.transpose(2, 3), grad)
        return None, None, query_grad, *own, *dk, *dv


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [b, Hk, Q, D] over k and v [b, Hk, P, D], ``mask`` [b, 1, Q, P] of 0 and -inf; with its
    log-sum-exp [b, Hk, Q], of no meaning where all is hidden."""
    if q.device.type == "cpu":
        return _flash(q, k, v, attn_mask=mask, scale=scale)
    scores = _scores(q, k, mask, scale)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0)).exp().to(v.dtype)
    return weights @ v, lse.squeeze(-1)


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[b, Hk, Q, P] in float32, or float64 where q is."""
    return (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale + mask


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``out`` and ``lse`` may be those of more keys than these."""
    if q.device.type == "cpu":
        return _flash_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    weights = (_scores(q, k, mask, scale) - lse.unsqueeze(-1)).exp().to(q.dtype)
    score_grad = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
    return score_grad @ k, score_grad.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad


def _own_scores(query: Tensor, own_key: Tensor, scale: float, new: int) -> Tensor:
    """[C, Hk, rep * n, m] of query [C, Hk, rep * n, D] and own keys [C, Hk, m, D], -inf for later tokens than a
    query's, which is one of the last n."""
    scores = (query.unsqueeze(-2) * own_key.unsqueeze(2)).sum(-1) * scale
    if new == 1:
        return scores
    rows, tokens = scores.shape[2:]
    step = torch.arange(tokens - new, tokens, device=query.device).repeat(rows // new)
    return scores.masked_fill(torch.arange(tokens, device=query.device) > step[:, None], -torch.inf)


def _weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """weights [C, Hk, q, m] @ rows [C, Hk, m, D], of few m."""
    return (weights.unsqueeze(-1) * rows.unsqueeze(2)).sum(-2)


def _halves(prompts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of the buckets."""
    return prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]


def _to_grid(rows: Tensor, completions: Completions) -> tuple[Tensor, ...]:
    """[C, ...] -> [cells, ...] of every bucket; cells without a completion hold zeros."""
    grid = rows.new_zeros(sum(completions.sizes), *rows.shape[1:]).index_copy(0, completions.cell, rows)
    return grid.split(completions.sizes)


def _from_grid(parts: list[Tensor], completions: Completions) -> Tensor:
    """[cells, ...] of every bucket -> [C, ...]."""
    return torch.cat(parts).index_select(0, completions.cell)


def _side_by_side(grid: Tensor, prompts: int) -> Tensor:
    """[b * G, Hk, q, X] -> [b, Hk, G * q, X]."""
    return grid.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)


def _apart(grid: Tensor, cells: int) -> Tensor:
    """[b, Hk, G * q, X] -> [b * G, Hk, q, X], ``cells`` b * G."""
    return grid.unflatten(2, (cells // len(grid), -1)).transpose(1, 2).flatten(0, 1)
