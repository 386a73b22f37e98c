"""Triton kernels for CUDA, each beside its eager reference, which computes elsewhere.

trie_grpo                 GRPO's loss over trie nodes and its gradient, one launch
sid_cross_entropy         SFT's loss over trie nodes and its gradient
prompt_attention          causal attention of packed prompts, forward and backward
completion_attention      attention of completions over a prefix of their shared prompt and their own tokens
add_norm                  an addition to the residual stream and the RMSNorm that follows
vocabulary_cross_entropy  the loss of a token of the whole vocabulary, by liger-kernel where installed

``x.py`` is what callers import, ``x_reference.py`` the formula in eager code, ``x_kernel.py`` the Triton code. Both
attentions share ``attention_inputs.py`` and ``attention_kernel.py``; both losses on the trie share ``trie_rows.py``.
"""

from importlib.metadata import version

import torch

from negfast.kernels.dispatch import HEAD_DIMS, liger_cross_entropy, runs_liger, runs_triton

ATTENTION = ("prompt_attention", "completion_attention")
PARTS = ("trie_grpo", "sid_cross_entropy", *ATTENTION)
VOCABULARY = "vocabulary_cross_entropy"  # of align's texts, and of the rows of grpo.objective = full
EAGER = "eager reference"


def implementations(device: torch.device | str, head_dim: int | None = None) -> dict[str, str]:
    """Which implementation each part runs on a device, e.g. {"trie_grpo": "triton 3.6.0", ...}, for a decoder whose
    heads have ``head_dim`` dimensions (None: one that the kernels take)."""
    if not runs_triton(torch.device(device), "trie_grpo"):
        return dict.fromkeys((*PARTS, VOCABULARY), EAGER)
    import triton

    from negfast.kernels.varlen import library

    found = dict.fromkeys(PARTS, f"triton {triton.__version__}")
    if torch.device(device).type == "cuda":
        found["prompt_attention"], _ = library()
    if head_dim is not None and head_dim not in HEAD_DIMS:
        taken = ", ".join(map(str, HEAD_DIMS))
        found |= dict.fromkeys(ATTENTION, f"{EAGER} (heads of {head_dim} dimensions; the kernels take {taken})")
    if not runs_liger(torch.device(device)):
        return found | {VOCABULARY: f"{EAGER} (liger-kernel is not installed)"}
    liger_cross_entropy()  # one that does not work fails here and not at the first loss
    return found | {VOCABULARY: f"liger-kernel {version('liger-kernel')}"}
