"""bfloat16 copies of a decoder's matrices, made once a step where autocast would cast a matrix at each of its calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightCopies:
    """Copies of the float32 matrices of a module's linear layers. They keep their addresses, so CUDA graphs may read
    them, and take 2 bytes a weight from the first use on."""

    def __init__(self, module: nn.Module) -> None:
        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        self.layers = [part for part in linear if part.weight.dtype == torch.float32]
        self.used = False
        self.copies = [torch.empty_like(part.weight, dtype=torch.bfloat16) for part in self.layers]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the layers compute with the copies, made anew; gradients reach the float32 matrices, added up over
        the calls of one backward in bfloat16. To be left before weights change."""
        made = Cast.apply(self.copies, *(layer.weight for layer in self.layers))
        for layer, copy in zip(self.layers, made, strict=True):
            vars(layer)["weight"] = copy  # found before the parameter, which stays where it is
        self.used = True
        try:
            yield
        finally:
            self.used = False
            for layer in self.layers:
                del vars(layer)["weight"]


class Cast(torch.autograd.Function):
    """Matrices in bfloat16, written to ``copies`` by one operation; their gradients in float32 by one."""

    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        torch._foreach_copy_(copies, weights)
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        known = [gradient for gradient in gradients if gradient is not None]
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in known]
        if known:
            torch._foreach_copy_(wide, known)
        in_order = iter(wide)
        return None, *(None if gradient is None else next(in_order) for gradient in gradients)
