"""Triton kernels, each beside its eager reference, for CUDA; elsewhere the references compute.

trie_grpo          fused_trie_grpo.py    GRPO's loss over trie nodes and its gradient, one launch
sid_cross_entropy  sid_cross_entropy.py  SFT's loss over trie nodes and its gradient
prompt_attention   prompt_attention.py   group attention of packed prompts, causal, forward and backward
answer_attention   answer_attention.py   and of the answers over their shared prompts and their own tokens
full_vocabulary    vocabulary.py         the loss of a token of the whole vocabulary, by liger-kernel where installed
"""

from importlib.metadata import version

import torch
from negfast.kernels.dispatch import HEAD_DIMS, liger_cross_entropy, runs_liger, runs_triton

ATTENTION = ("prompt_attention", "answer_attention")
PARTS = ("trie_grpo", "sid_cross_entropy", *ATTENTION)
FULL_VOCABULARY = "full_vocabulary"  # what align says in words, and the rows of grpo.objective = full
EAGER = "eager reference"


def implementations(device: torch.device | str, head_dim: int | None = None) -> dict[str, str]:
    """Which implementation each part runs on a device, e.g. {"trie_grpo": "triton 3.6.0", ...}, for a decoder whose
    heads have ``head_dim`` dimensions (None: one that the kernels take)."""
    if not runs_triton(torch.device(device)):
        return dict.fromkeys((*PARTS, FULL_VOCABULARY), EAGER)
    import triton

    found = dict.fromkeys(PARTS, f"triton {triton.__version__}")
    if head_dim is not None and head_dim not in HEAD_DIMS:
        taken = ", ".join(map(str, HEAD_DIMS))
        found |= dict.fromkeys(ATTENTION, f"{EAGER} (heads of {head_dim} dimensions; the kernels take {taken})")
    if not runs_liger(torch.device(device)):
        return found | {FULL_VOCABULARY: f"{EAGER} (liger-kernel is not installed)"}
    liger_cross_entropy()  # one that does not work fails here and not at the first loss
    return found | {FULL_VOCABULARY: f"liger-kernel {version('liger-kernel')}"}
