"""Launches as registered PyTorch operators, so that torch.compile and fake tensors know them."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("negfast", "DEF")


def operator(name: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The operator ``torch.ops.negfast.<name>``: computes by ``compute``, whose annotations are its schema.

    ``fake`` returns tensors of the same shapes and dtypes without computing. The operator has no gradient of its own:
    an autograd Function calls it.
    """
    LIBRARY.define(name + torch.library.infer_schema(compute, mutates_args=()))
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"negfast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.negfast, name).default
