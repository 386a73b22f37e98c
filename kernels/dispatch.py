"""Where Triton kernels run: on CUDA, and on the CPU under Triton's interpreter, which only tests ask for."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HEAD_DIMS = (32, 64, 128)  # of attention
# Triton reads the variable when a kernel is decorated, hence once, at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

KERNELS = ("trie_grpo", "sid_cross_entropy", "attention", "liger")  # as `eager` names them; "liger": fused layers too
_eager: ContextVar[tuple[str, ...]] = ContextVar("negfast_eager", default=())


@contextmanager
def eager(*kernels: str) -> Iterator[None]:
    """Within it eager references replace ``kernels``, by default all, on any device: whole steps are compared so."""
    token = _eager.set((*_eager.get(), *(kernels or KERNELS)))
    try:
        yield
    finally:
        _eager.reset(token)


def runs_triton(device: torch.device, kernel: str) -> bool:
    """Whether tensors of this device go to a Triton kernel; otherwise the eager reference computes."""
    return (device.type == "cuda" or INTERPRETED) and kernel not in _eager.get()


def attention_runs_triton(query: Tensor) -> bool:
    """The same for attention; heads of another dimension than the kernels take go to the reference."""
    return runs_triton(query.device, "attention") and query.shape[-1] in HEAD_DIMS


def runs_liger(device: torch.device) -> bool:
    """Whether rows over a whole vocabulary, norms, rotary embedding and SwiGLU go to liger-kernel."""
    return runs_triton(device, "liger") and find_spec("liger_kernel") is not None


@cache
def liger_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's cross entropy, a loss a row; ImportError where the installed liger-kernel does not work."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss(reduction="none")


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, as 90 for sm_90; elsewhere the one that kernels are compiled for."""
    if device.type != "cuda":
        return compile_for
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; elsewhere those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


compile_for = 90  # set by tools/compile_kernels.py, which has no device


def check_tensors(
    shapes: Mapping[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]], device: torch.device
) -> None:
    """Raise ValueError at the first tensor of another shape, dtype or device than the kernel reads; None passes."""
    for name, (tensor, shape, dtype) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: found {tensor.dtype}, expected {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: found on {tensor.device}, expected {device}")
