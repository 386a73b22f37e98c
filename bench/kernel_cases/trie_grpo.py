"""Cases of GRPO's loss on the trie."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_cases.case import Case, compiled, gradient, table_bytes
from negfast.kernels.trie_grpo import GRPOObjective, trie_grpo
from negfast.kernels.trie_grpo_reference import SampledTokens, trie_grpo_reference
from negfast.kernels.trie_rows_reference import dense_policy, log_policy
from tests.kernels import cases as inputs


def trie_grpo_case(rows: int, codebook: int, dtype: torch.dtype) -> Case:
    """Loss and gradient of one token a row under a reference with exact KL; the result compared is dlogits."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        data = inputs.wide_trie_case(1, device, rows, codebook, 16, dtype)
        objective = GRPOObjective(beta=0.04)
        rest = (data.tables, data.rows, data.tokens, data.rewards, objective)
        valid, log_prior = dense_policy(data.tables, data.rows)
        completion = torch.arange(rows, device=device)
        sampled = SampledTokens(data.tokens.row.long(), data.tokens.code[0].long(), completion, data.tokens.counted[0])

        def dense(logits: Tensor, reference: Tensor) -> Tensor:
            log_ref = log_policy(reference, valid, log_prior, objective.temperature)
            return trie_grpo_reference(logits, valid, log_prior, sampled, data.rewards, objective, 1, log_ref).loss

        def ours(logits: Tensor) -> Tensor:
            return trie_grpo(logits, *rest, reference=data.reference, check_rewards=False).loss

        systems = {
            "negfast": gradient(ours, data.logits),
            "eager, dense mask and prior given": gradient(dense, data.logits, data.reference),
            "torch.compile of eager": gradient(compiled(dense), data.logits, data.reference),
        }
        if device.type == "cuda" and find_spec("liger_kernel"):
            systems["liger grpo (no trie, k3, advantages and log-probabilities given)"] = _liger_grpo(data)
        return systems

    moved = 3 * rows * codebook * dtype.itemsize + table_bytes(rows, codebook) + 49 * rows
    shape = {"rows": rows, "codes": codebook, "dtype": str(dtype)[6:]}
    return Case("trie_grpo", shape, int(moved), 25 * rows * codebook, build)


def _liger_grpo(data: Any) -> Callable[[], Tensor]:
    """Liger's loss over 64 tokens a sequence; it expects one position more than it has tokens."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    rows, codebook = data.logits.shape
    logits = F.pad(data.logits.view(rows // 64, 64, codebook), (0, 0, 0, 1))
    ids = data.tokens.code.view(rows // 64, 64).long()
    known = torch.zeros(rows // 64, 64, device=logits.device)
    advantage = torch.randn(rows // 64, device=logits.device)

    def loss(leaf: Tensor) -> Tensor:
        return triton_grpo_loss(
            leaf, known, known, ids, advantage, temperature=1.0, beta=0.04, inplace=False, loss_type="grpo", reduce=True
        )[0]

    return gradient(loss, logits)
