"""Activation checkpointing: a decoder layer keeps its input alone, and its backward computes the rest anew.

For models whose activations do not fit; a step takes about a third longer. Keys and values that later calls attend to
are kept, and so is what the last layer reads of the prompts.
"""

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from negfast.model.layout import GroupLayout, Keys
from negfast.model.policy import Policy


def recompute_layers(policy: Policy) -> None:
    """Changes the layers of this decoder so; gradients stay what they are."""
    for layer in policy.decoder.layers:
        layer.forward = MethodType(_recomputed(layer.forward.__func__), layer)


def _recomputed(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(layer: nn.Module, hidden: Any, *args: Any, layout: GroupLayout, **rest: Any) -> Any:
        if not torch.is_grad_enabled():
            return stock(layer, hidden, *args, layout=layout, **rest)
        layouts = [_as_now(layout, int(layer.self_attn.layer_idx)), layout]  # type: ignore[union-attr, arg-type]

        def run(hidden: Any) -> Any:
            """First on the layout itself, then, in the backward, on what it was before."""
            return stock(layer, hidden, *args, layout=layouts.pop(), **rest)

        return checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)

    return forward


def _as_now(layout: GroupLayout, layer: int) -> GroupLayout:
    """A copy that later calls and the layer itself do not change."""
    kept = layout.keys.get(layer)
    return replace(layout, keys=Keys() if kept is None else Keys({layer: replace(kept)}))
