"""Triton kernels, each beside its eager reference, for CUDA; elsewhere the references compute.

trie_grpo          fused_trie_grpo.py    GRPO's loss over trie nodes and its gradient, one launch
sid_cross_entropy  sid_cross_entropy.py  SFT's loss over trie nodes and its gradient, one launch
prompt_attention   prompt_attention.py   group attention of packed prompts, causal, forward and backward
answer_attention   answer_attention.py   and of the answers over their shared prompts and their own tokens
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
