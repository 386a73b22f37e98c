"""Attention of completions over their shared prompts and their own tokens against float64."""

from dataclasses import replace

import pytest
import torch

from negfast.kernels.completion_attention import completion_attention
from negfast.kernels.completion_attention_reference import completion_attention_reference
from tests.kernels.attention_checks import check, check_bits, check_operators
from tests.kernels.cases import attention_case


@pytest.mark.parametrize("group", [1, 3, 64])
@pytest.mark.parametrize(("new", "seen"), [(1, 1), (1, 3), (3, 3), (2, 4)], ids=str)
def test_completions(group: int, new: int, seen: int, device: torch.device, seed: int):
    lengths, heads = ((70, 1, 33), 4) if group < 64 else ((70,), 2)
    case = attention_case(seed, device, lengths, heads, heads // 2, 64, group=group, new=new, seen=seen)
    check(case.completions(), completion_attention, completion_attention_reference)


@pytest.mark.parametrize("groups", [(5, 0, 17), (0, 0, 1), (1, 40, 0)], ids=str)
@pytest.mark.parametrize(("new", "seen"), [(1, 2), (3, 3)], ids=str)
def test_prompts_with_different_numbers_of_completions(
    groups: tuple[int, ...], new: int, seen: int, device: torch.device, seed: int
):
    case = attention_case(seed, device, (40, 7, 65), 2, 1, 32, group=groups, new=new, seen=seen)
    check(case.completions(), completion_attention, completion_attention_reference)


@pytest.mark.parametrize("new", [1, 2])
def test_queries_that_see_the_prompt_alone(new: int, device: torch.device, seed: int):
    """As a prompt's last token does; one prompt is much shorter than the splits of the longest."""
    case = attention_case(seed, device, (300, 1, 33), 4, 2, 32, new=new, seen=0)
    check(case.completions(), completion_attention, completion_attention_reference)


def test_no_completions_at_all(device: torch.device, seed: int):
    part = attention_case(seed, device, (4, 3), 2, 1, 32, group=0).completions()
    assert completion_attention(*part.tensors, *part.segments).shape == (0, 1, 2, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_completions_in_half_precision(dtype: torch.dtype, dim: int, device: torch.device, seed: int):
    case = attention_case(seed, device, (507, 123), 2, 1, dim, group=5, new=3, seen=3, dtype=dtype)
    check(case.completions(), completion_attention, completion_attention_reference)


def test_runs_are_bit_equal(device: torch.device, seed: int):
    case = attention_case(seed, device, (130, 40), 2, 1, 64, group=3, new=2, seen=3, dtype=torch.bfloat16)
    check_bits(case.completions(), completion_attention)


def test_operators_are_registered_for_compilation(device: torch.device, seed: int):
    case = attention_case(seed, device, (20, 9), 2, 1, 32, group=2, new=1, seen=2)
    check_operators(case.completions(), "completion_attention")


def test_what_is_unsupported_raises(device: torch.device, seed: int):
    part = attention_case(seed, device, (9, 4), 4, 2, 32, group=2, new=1, seen=2).completions()
    query, prompt_key, prompt_value, own_key, own_value = part.tensors
    keys = prompt_key, prompt_value, own_key, own_value
    with pytest.raises(ValueError, match="own_key: found 2 tokens a completion, expected none or at least the 3"):
        completion_attention(query.expand(-1, 3, -1, -1), *keys, *part.segments)
    prompts, completions = part.segments
    with pytest.raises(ValueError, match=r"prompts\.offsets: found torch\.int64"):
        completion_attention(query, *keys, replace(prompts, offsets=prompts.offsets.long()), completions)
    with pytest.raises(ValueError, match=r"completions\.offsets: found shape"):
        completion_attention(query, *keys, prompts, replace(completions, offsets=completions.offsets[1:]))
