"""Cases of SFT's loss on the trie."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_cases.case import Case, compiled, gradient, table_bytes
from negfast.kernels.sid_cross_entropy import sid_cross_entropy
from negfast.kernels.trie_rows_reference import dense_policy
from tests.kernels import cases as inputs


def sid_cross_entropy_case(rows: int, codebook: int, dtype: torch.dtype) -> Case:
    """Loss and gradient of one target a row; the result compared is dlogits."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        data = inputs.wide_trie_case(2, device, rows, codebook, 16, dtype)
        rest = (data.tables, data.rows, data.tokens.code[0])
        valid, log_prior = dense_policy(data.tables, data.rows)
        assert log_prior is not None
        target = data.tokens.code[0].long()

        def dense(logits: Tensor) -> Tensor:
            return F.cross_entropy((logits.float() + log_prior).masked_fill(~valid, -torch.inf), target)

        systems = {
            "negfast": gradient(lambda z: sid_cross_entropy(z, *rest).mean(), data.logits),
            "eager, dense mask and prior given": gradient(dense, data.logits),
            "torch.compile of eager": gradient(compiled(dense), data.logits),
        }
        if device.type == "cuda" and find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerCrossEntropyLoss

            liger = LigerCrossEntropyLoss()
            systems["liger cross entropy (no trie)"] = gradient(lambda z: liger(z * 1, target), data.logits)
        return systems

    moved = 3 * rows * codebook * dtype.itemsize + 2 * table_bytes(rows, codebook) + 56 * rows
    shape = {"rows": rows, "codes": codebook, "dtype": str(dtype)[6:]}
    return Case("sid_cross_entropy", shape, int(moved), 24 * rows * codebook, build)
