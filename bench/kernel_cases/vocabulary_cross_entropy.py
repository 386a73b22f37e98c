"""Cases of the loss over a whole vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_cases.case import Case, compiled, gradient
from negfast.kernels.vocabulary_cross_entropy import vocabulary_cross_entropy


def vocabulary_cross_entropy_case(rows: int, width: int) -> Case:
    """Loss and gradient of one target a row over a whole vocabulary, float32; the result compared is dlogits."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        generator = torch.Generator(device).manual_seed(5)
        logits = 2 * torch.randn(rows, width, generator=generator, device=device)
        target = torch.randint(width, (rows,), generator=generator, device=device)

        def dense(z: Tensor) -> Tensor:
            return F.cross_entropy(1 * z, target)

        return {  # the product is for Liger, which leaves gradients in the memory of logits; so all systems have it
            "negfast": gradient(lambda z: vocabulary_cross_entropy(1 * z, target).mean(), logits),
            "eager": gradient(dense, logits),
            "torch.compile of eager": gradient(compiled(dense), logits),
        }

    # a row does not fit on chip: read twice, and the gradient written
    return Case(
        "vocabulary_cross_entropy", {"rows": rows, "tokens": width}, 3 * rows * width * 4, 10 * rows * width, build
    )
