"""Group attention: packed prompts causal to themselves, the answers of each over the prompt and their own tokens.

The prompt's keys and values are never copied per answer. The two halves are kernels of their own, whose docstrings
give derivations, bytes and FLOPs: prompt_attention.py and answer_attention.py.
"""

import torch
from negfast.kernels.answer_attention import answer_attention, answer_attention_reference
from negfast.kernels.prompt_attention import prompt_attention, prompt_attention_reference
from torch import Tensor


def group_attention(
    prompt: tuple[Tensor, Tensor, Tensor],
    answers: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(prompt_out [T, H, D], answer_out [B, G, n, H, D]) of prompts and whole answers in one forward.

    prompt: query [T, H, D], key and value [T, Hk, D]; answers: query [B, G, n, H, D], key and value [B, G, n, Hk, D];
    cu_seqlens int32 [B + 1]. For answers that grow token by token call the halves. Differentiable; raises ValueError
    on unsupported shapes, dtypes and devices; on the CPU the eager reference computes.
    """
    query, key, value = prompt
    prompt_out = prompt_attention(query, key, value, cu_seqlens, longest, scale)
    answer_query, own_key, own_value = answers
    answer_out = answer_attention(answer_query, key, value, own_key, own_value, cu_seqlens, longest, scale)
    return prompt_out, answer_out


def group_attention_reference(
    prompt: tuple[Tensor, Tensor, Tensor],
    answers: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, eager, in any dtype."""
    query, key, value = prompt
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    prompt_out = prompt_attention_reference(query, key, value, cu_seqlens, scale)
    answer_query, own_key, own_value = answers
    return prompt_out, answer_attention_reference(answer_query, key, value, own_key, own_value, cu_seqlens, scale)


def full_sequences_reference(
    prompt: tuple[Tensor, Tensor, Tensor], answers: tuple[Tensor, Tensor, Tensor], cu_seqlens: Tensor
) -> Tensor:
    """Answer outputs [B, G, n, H, D] as a library without groups computes them: every prompt + answer a sequence."""
    outputs = []
    for b, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        for g in range(answers[0].shape[1]):
            whole = [torch.cat([p[begin:end], a[b, g]]) for p, a in zip(prompt, answers, strict=True)]
            length = torch.tensor([0, len(whole[0])], dtype=torch.int32)
            outputs.append(prompt_attention_reference(*whole, length, whole[0].shape[-1] ** -0.5)[end - begin :])
    return torch.stack(outputs).view(answers[0].shape)
