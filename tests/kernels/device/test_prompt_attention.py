"""Causal attention of packed prompts against float64."""

from dataclasses import replace

import pytest
import torch

from negfast.kernels.prompt_attention import prompt_attention
from negfast.kernels.prompt_attention_reference import prompt_attention_reference
from tests.kernels.attention_checks import check, check_bits, check_operators
from tests.kernels.cases import attention_case


@pytest.mark.parametrize("lengths", [(1, 3), (63, 64, 65), (123, 2, 17)], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_prompts(lengths: tuple[int, ...], dim: int, device: torch.device, seed: int):
    check(attention_case(seed, device, lengths, 2, 1, dim).prompts(), prompt_attention, prompt_attention_reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_prompts_in_half_precision(dtype: torch.dtype, device: torch.device, seed: int):
    case = attention_case(seed, device, (252, 130), 4, 2, 64, dtype=dtype)
    check(case.prompts(), prompt_attention, prompt_attention_reference)


def test_runs_are_bit_equal(device: torch.device, seed: int):
    case = attention_case(seed, device, (130, 40), 2, 1, 64, group=3, new=2, seen=3, dtype=torch.bfloat16)
    check_bits(case.prompts(), prompt_attention)


def test_operators_are_registered_for_compilation(device: torch.device, seed: int):
    case = attention_case(seed, device, (20, 9), 2, 1, 32, group=2, new=1, seen=2)
    check_operators(case.prompts(), "prompt_attention")


def test_what_is_unsupported_raises(device: torch.device, seed: int):
    part = attention_case(seed, device, (9, 4), 4, 2, 32).prompts()
    query, key, value = part.tensors
    (prompts,) = part.layout
    for message, arguments in {
        "head dimension: found 24": (query[..., :24], key[..., :24], value[..., :24]),
        "query heads: found 3": (query[:, :3], key, value),
        r"query: found torch\.float64": (query.double(), key.double(), value.double()),
        r"key: found torch\.bfloat16": (query, key.bfloat16(), value),
        "value: found shape": (query, key, value[1:]),
    }.items():
        with pytest.raises(ValueError, match=message):
            prompt_attention(*arguments, prompts)
    with pytest.raises(ValueError, match=r"prompts\.offsets: found torch\.int64"):
        prompt_attention(query, key, value, replace(prompts, offsets=prompts.offsets.long()))
