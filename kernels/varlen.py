"""Causal attention of packed prompts by what is best where it runs: flash-attn, torch's own, else our Triton kernel."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import triton
from torch import Tensor

from negfast.kernels.attention_inputs import Segments
from negfast.kernels.prompt_attention import prompt_attention

HALF_TYPES = (torch.bfloat16, torch.float16)  # the only ones that the libraries take


def causal_attention(query: Tensor, key: Tensor, value: Tensor, prompts: Segments, scale: float) -> Tensor:
    """`prompt_attention`, on a GPU in half precision by a library where there is one. Bit-equal from run to run either
    way: the libraries' backward is asked not to add atomically."""
    if query.device.type == "cuda" and query.dtype in HALF_TYPES and query.numel():
        _, call = library()
        if call is not None:
            return call(query, key, value, prompts, scale)
    return prompt_attention(query, key, value, prompts, scale)


@cache
def library() -> tuple[str, Callable[..., Tensor] | None]:
    """Name and version of what computes, and its call; None: the Triton kernel."""
    if find_spec("flash_attn") is not None and torch.cuda.get_device_capability() >= (8, 0):
        return f"flash-attn {version('flash-attn')}", _flash_attn
    if find_spec("torch.nn.attention.varlen") is not None and torch.backends.cuda.is_flash_attention_available():
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():  # torch 2.12 and later
            return f"torch {torch.__version__}", _varlen_attn
    return f"triton {triton.__version__}", None


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, prompts: Segments, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=prompts.offsets,
        cu_seqlens_k=prompts.offsets,
        max_seqlen_q=prompts.longest,
        max_seqlen_k=prompts.longest,
        softmax_scale=scale,
        causal=True,
        deterministic=True,
    )


def _varlen_attn(query: Tensor, key: Tensor, value: Tensor, prompts: Segments, scale: float) -> Tensor:
    return Varlen.apply(query, key, value, prompts, scale)


class Varlen(torch.autograd.Function):
    """torch's varlen_attn with a backward that is deterministic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, prompts: Segments, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        rows, most = prompts.offsets, prompts.longest
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            q, k, v = (x.detach().requires_grad_(torch.is_grad_enabled()) for x in (query, key, value))
            ctx.out = varlen_attn(q, k, v, rows, rows, most, most, scale=scale, window_size=(-1, 0), enable_gqa=True)
        ctx.inputs = q, k, v
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with deterministic():
            found = torch.autograd.grad(ctx.out, ctx.inputs, grad)
        del ctx.out, ctx.inputs
        return *found, None, None


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
