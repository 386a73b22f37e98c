"""One size of one kernel as the benchmark times it, and what the makers of cases share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One size of one kernel, the least it must move and compute, and how to make its inputs on a device.

    ``build`` returns systems by name, calls that return the main result, to be compared with negfast's.
    """

    kernel: str
    shape: dict[str, Any]
    bytes: int
    flops: int
    build: Callable[[torch.device], dict[str, Callable[[], Any]]]


def gradient(function: Callable[..., Tensor], tensor: Tensor, *rest: Tensor) -> Callable[[], Tensor]:
    leaf = tensor.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf, *rest), leaf)[0]


def compiled(function: Callable) -> Callable:
    """torch.compile on a GPU; on the CPU, where tests only compare results, the function itself."""
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() else function


def attention_systems(calls: dict[str, Callable[..., Tensor]], data: Any, backward: bool) -> dict[str, Callable]:
    leaves = [tensor.detach().requires_grad_(backward) for tensor in data.tensors]
    if not backward:
        return {name: lambda c=call: c(*leaves) for name, call in calls.items()}
    return {name: lambda c=call: torch.autograd.grad(c(*leaves), leaves, data.grad)[0] for name, call in calls.items()}


def table_bytes(rows: int, codebook: int) -> float:
    """Child bits and log masses of the nodes of ``wide_trie_case``, each once."""
    return min(rows, 2048) * (codebook / 8 + 0.3 * codebook * 4 * min(4, max(rows / 2048, 1)))
