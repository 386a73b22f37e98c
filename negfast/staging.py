"""Arrays on their way to the device."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def put(array: np.ndarray, device: torch.device | str) -> Tensor:
    """``array`` as a tensor of ``device``. To CUDA it goes from pinned memory without waiting, on the current stream;
    PyTorch keeps the pinned copy until it has arrived."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a batch: of dataclasses (what they keep of computed properties too), lists, tuples, dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))
