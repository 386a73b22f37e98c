"""The layers of a loaded decoder by fused kernels: additions to the residual stream with the norms behind them by
`add_norm`, norms of heads, rotary embedding and SwiGLU by liger-kernel.

Modules of this one decoder are changed, no class and no module of transformers, and parameters keep their names. Liger
saves memory by overwriting; what that means for the group pass, in which a prompt's keys serve several calls:

- SwiGLU's backward overwrites its saved inputs: the outputs of two linear layers, which nothing else reads. So a graph
  can be walked once only; no step walks one twice.
- The rotary embedding overwrites queries and keys on their way in (a norm's or a linear layer's output, which no
  backward needs) and their gradients on the way out. Keys that several calls attend to are its outputs, and their
  gradients are summed before they reach it.
- RMSNorm's backward would overwrite the gradient that comes in, which others may hold: that is switched off.

A layer hands on what it leaves to be added (`Unsummed`), since the next layer's norm makes the addition.
"""

import inspect
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from negfast.kernels.add_norm import add_norm
from negfast.kernels.dispatch import runs_liger, runs_triton
from negfast.model.policy import Policy

DECODERS = ("qwen3", "llama")  # whose norms, rotary embedding and SwiGLU are those that liger computes


class Unsummed(NamedTuple):
    """Hidden states [1, N, d] as the stream and what a layer is yet to add to it."""

    stream: Tensor
    branch: Tensor


class FusedAddNorm(nn.Module):
    """RMSNorm of hidden states, with the addition that a layer left; float32 within. Before a layer's products it gives
    the sum too, and normed rows in the type of autocast's products; at the end of the decoder float32 alone."""

    def __init__(self, stock: Any, feeds_products: bool) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = stock.weight, stock.variance_epsilon
        self.feeds_products = feeds_products

    def forward(self, hidden_states: Tensor | Unsummed) -> Tensor | tuple[Tensor, Tensor]:
        stream, branch = (hidden_states, None) if isinstance(hidden_states, Tensor) else hidden_states
        device, dtype = stream.device.type, torch.float32
        if self.feeds_products:
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stream.dtype
        total, normed = add_norm(stream, branch, self.weight, self.variance_epsilon, dtype)
        return (total, normed) if self.feeds_products else normed


class FusedNorm(nn.Module):
    """RMSNorm over the last dimension, of heads; float32 within, the result in the type of the input."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = stock.weight, stock.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        from liger_kernel.ops import LigerRMSNormFunction

        in_place = False
        return LigerRMSNormFunction.apply(
            hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", in_place, None
        )


class FusedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = stock.gate_proj, stock.up_proj, stock.down_proj

    def forward(self, x: Tensor) -> Tensor:
        from liger_kernel.ops import LigerSiLUMulFunction

        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


def stock_because(policy: Policy, device: torch.device) -> str | None:
    """Why the layers stay as transformers has them, in words; None where `fuse_layers` changes them."""
    config = policy.decoder.config
    if not runs_triton(device, "liger"):
        return "no CUDA"
    if not runs_liger(device):
        return "liger-kernel is not installed"
    if config.model_type not in DECODERS or config.hidden_act != "silu":
        return f"liger-kernel is not used for {config.model_type} with {config.hidden_act}"
    return None


def fuse_layers(policy: Policy, device: torch.device) -> None:
    """Changes ``policy`` where liger-kernel runs on ``device`` and knows the decoder."""
    if stock_because(policy, device) is not None:
        return
    for name, module in list(policy.decoder.named_modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm") and ".self_attn." in name:
            policy.decoder.set_submodule(name, FusedNorm(module))
        elif kind.endswith("RMSNorm"):
            policy.decoder.set_submodule(name, FusedAddNorm(module, name.endswith("layernorm")))
        elif kind.endswith("MLP"):
            policy.decoder.set_submodule(name, FusedMlp(module))
        elif kind.endswith("Attention"):
            module.forward = MethodType(_with_fused_rotation(type(module).forward), module)
        elif kind.endswith("DecoderLayer"):
            module.forward = MethodType(_fused_layer, module)


def _fused_layer(layer: Any, hidden: Tensor | Unsummed, **options: Any) -> Unsummed:
    """A layer's forward, which leaves its last addition to the next norm."""
    stream, normed = layer.input_layernorm(hidden)
    attended, _ = layer.self_attn(hidden_states=normed, **options)
    stream, normed = layer.post_attention_layernorm(Unsummed(stream, attended))
    return Unsummed(stream, layer.mlp(normed))


def _with_fused_rotation(forward: FunctionType) -> FunctionType:
    """The same function with another ``apply_rotary_pos_emb`` among its globals."""
    stock = inspect.unwrap(forward)
    names = stock.__globals__ | {"apply_rotary_pos_emb": fused_rotation}
    changed = FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    changed.__kwdefaults__ = stock.__kwdefaults__
    return changed


def fused_rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated query [1, H, N, D] and key [1, Hk, N, D], which it may overwrite; ``cos`` and ``sin`` [1, N, D]."""
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(query, key, cos, sin)
