"""Triton kernels, each beside its eager reference, for CUDA; elsewhere the references compute.

trie_grpo          fused_trie_grpo.py    GRPO's loss over trie nodes and its gradient, one launch
sid_cross_entropy  sid_cross_entropy.py  SFT's loss over trie nodes and its gradient, one launch
group_attention    group_attention.py    prompts causal (prompt_attention.py), answers over shared prompts
                                         (answer_attention.py), forward and backward
"""

import torch
from negfast.kernels.dispatch import runs_triton

PARTS = ("trie_grpo", "sid_cross_entropy", "prompt_attention", "answer_attention")


def implementations(device: torch.device | str) -> dict[str, str]:
    """Which implementation each part runs on a device, e.g. {"trie_grpo": "triton 3.6.0", ...}."""
    if not runs_triton(torch.device(device)):
        return dict.fromkeys(PARTS, "eager reference")
    import triton

    return dict.fromkeys(PARTS, f"triton {triton.__version__}")
