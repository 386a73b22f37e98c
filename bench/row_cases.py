"""Cases of the losses over rows of logits: GRPO and cross entropy on the trie, cross entropy over a vocabulary."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from negfast.kernels import fused_trie_grpo
from negfast.kernels.sid_cross_entropy import sid_cross_entropy
from negfast.kernels.trie_grpo import GRPOObjective, SampledTokens, log_policy, trie_grpo_reference
from negfast.kernels.trie_rows import dense_policy
from negfast.kernels.vocabulary import vocabulary_nll
from torch import Tensor

from bench.kernel_case import Case, compiled, gradient, inputs


def trie_grpo_case(rows: int, codebook: int, dtype: torch.dtype) -> Case:
    """Loss and gradient of one token a row under a reference with exact KL; the result compared is dlogits."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        data = inputs.wide_trie_case(1, device, rows, codebook, 16, dtype)
        objective = GRPOObjective(beta=0.04)
        arguments = (data.logits, data.tables, data.rows, data.tokens, data.code, data.counted, data.rewards, objective)
        valid, log_prior = dense_policy(data.tables, data.rows)
        answer = torch.arange(rows, device=device)
        sampled = SampledTokens(data.tokens.row.long(), data.code[0].long(), answer, data.counted[0])

        def dense(logits: Tensor, reference: Tensor) -> Tensor:
            log_ref = log_policy(reference, valid, log_prior, objective.temperature)
            return trie_grpo_reference(logits, valid, log_prior, sampled, data.rewards, objective, 1, log_ref).loss

        systems = {
            "negfast": lambda: fused_trie_grpo.launch(*arguments, data.reference)[5],
            "eager, dense mask and prior given": gradient(dense, data.logits, data.reference),
            "torch.compile of eager": gradient(compiled(dense), data.logits, data.reference),
        }
        if device.type == "cuda" and find_spec("liger_kernel"):
            systems["liger grpo (no trie, k3, advantages and log-probabilities given)"] = _liger_grpo(data)
        return systems

    moved = 3 * rows * codebook * dtype.itemsize + _table_bytes(rows, codebook) + 49 * rows
    shape = {"rows": rows, "codes": codebook, "dtype": str(dtype)[6:]}
    return Case("trie_grpo", shape, int(moved), 25 * rows * codebook, build)


def cross_entropy_case(rows: int, codebook: int, dtype: torch.dtype) -> Case:
    """Loss and gradient of one target a row; the result compared is dlogits."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        data = inputs.wide_trie_case(2, device, rows, codebook, 16, dtype)
        rest = (data.tables, data.rows, data.code[0])
        valid, log_prior = dense_policy(data.tables, data.rows)
        target = data.code[0].long()

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

    moved = 3 * rows * codebook * dtype.itemsize + 2 * _table_bytes(rows, codebook) + 56 * rows
    shape = {"rows": rows, "codes": codebook, "dtype": str(dtype)[6:]}
    return Case("sid_cross_entropy", shape, int(moved), 24 * rows * codebook, build)


def vocabulary_case(rows: int, width: int) -> Case:
    """Loss and gradient of one target a row over a whole vocabulary, float32; the result compared is dlogits."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        generator = torch.Generator(device).manual_seed(5)
        logits = 2 * torch.randn(rows, width, generator=generator, device=device)
        target = torch.randint(width, (rows,), generator=generator, device=device)

        def dense(z: Tensor) -> Tensor:
            return F.cross_entropy(1 * z, target)

        return {  # the product is for Liger, which leaves gradients in the memory of logits; so all systems have it
            "negfast": gradient(lambda z: vocabulary_nll(1 * z, target).mean(), logits),
            "eager": gradient(dense, logits),
            "torch.compile of eager": gradient(compiled(dense), logits),
        }

    # a row does not fit on chip: read twice, and the gradient written
    return Case("full_vocabulary", {"rows": rows, "tokens": width}, 3 * rows * width * 4, 10 * rows * width, build)


def _table_bytes(rows: int, codebook: int) -> float:
    """Child bits and log masses of the nodes of ``wide_trie_case``, each once."""
    return min(rows, 2048) * (codebook / 8 + 0.3 * codebook * 4 * min(4, max(rows / 2048, 1)))


def _liger_grpo(data: Any) -> Callable[[], Tensor]:
    """Liger's loss over 64 tokens a sequence; it expects one position more than it has tokens."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    rows, codebook = data.logits.shape
    logits = F.pad(data.logits.view(rows // 64, 64, codebook), (0, 0, 0, 1))
    ids = data.code.view(rows // 64, 64).long()
    known = torch.zeros(rows // 64, 64, device=logits.device)
    advantage = torch.randn(rows // 64, device=logits.device)

    def loss(leaf: Tensor) -> Tensor:
        return triton_grpo_loss(
            leaf, known, known, ids, advantage, temperature=1.0, beta=0.04, inplace=False, loss_type="grpo", reduce=True
        )[0]

    return gradient(loss, logits)
