"""The SFT loss over dense rows in eager code: the one place where its formula stands."""

import torch
from torch import Tensor

from negfast.kernels.trie_rows_reference import log_policy


def sid_cross_entropy_reference(logits: Tensor, valid: Tensor, log_prior: Tensor | None, code: Tensor) -> Tensor:
    """nll [R] over dense masks and priors [R, K], code int64 [R]; float32, or float64 where ``logits`` are."""
    log_p = log_policy(logits, valid, log_prior, temperature=1.0).gather(1, code.unsqueeze(1))[:, 0]
    return torch.where(valid.any(-1), -log_p, 0.0)
