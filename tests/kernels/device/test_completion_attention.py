"""Attention of completions over prefixes of their shared prompts and their own tokens against float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from negfast.kernels.completion_attention import completion_attention
from negfast.kernels.completion_attention_reference import completion_attention_reference
from tests.kernels.attention_checks import check, check_bits, check_operators, gradients
from tests.kernels.cases import attention_case

KINDS = ("full", "zero", "equal", "spread", "random", "unsorted")


@pytest.mark.parametrize("group", [1, 3, 64])
@pytest.mark.parametrize(("new", "seen"), [(1, 1), (1, 3), (3, 3), (2, 4), (4, 5)], ids=str)
def test_completions(group: int, new: int, seen: int, device: torch.device, seed: int):
    lengths, heads = ((70, 1, 33), 4) if group < 64 else ((70,), 2)
    case = attention_case(seed, device, lengths, heads, heads // 2, 64, group=group, new=new, seen=seen)
    check(case.completions(), completion_attention, completion_attention_reference)


@pytest.mark.parametrize("prefix", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (4, 2)], ids=str)
def test_prefixes(prefix: str, heads: int, kv_heads: int, device: torch.device, seed: int):
    """Several tiles of rows and splits of keys; one prompt is much shorter than the splits of the longest."""
    case = attention_case(
        seed, device, (163, 1, 33), heads, kv_heads, 32, group=(19, 2, 5), new=2, seen=3, prefix=prefix
    )
    check(case.completions(), completion_attention, completion_attention_reference)


@pytest.mark.parametrize("groups", [(5, 0, 17), (0, 0, 1), (1, 40, 0)], ids=str)
@pytest.mark.parametrize(("new", "seen"), [(1, 2), (3, 3)], ids=str)
def test_prompts_with_different_numbers_of_completions(
    groups: tuple[int, ...], new: int, seen: int, device: torch.device, seed: int
):
    case = attention_case(seed, device, (40, 7, 65), 2, 1, 32, group=groups, new=new, seen=seen)
    check(case.completions(), completion_attention, completion_attention_reference)


def test_no_completions_at_all(device: torch.device, seed: int):
    part = attention_case(seed, device, (4, 3), 2, 1, 32, group=0).completions()
    assert completion_attention(*part.tensors, *part.layout).shape == (0, 1, 2, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_completions_in_half_precision(dtype: torch.dtype, dim: int, device: torch.device, seed: int):
    """No short prefixes: of few such rows, chance decides whether the rounded output or eager code is further off."""
    sizes: dict[str, Any] = {"group": 5, "new": 3, "seen": 3, "prefix": "spread", "dtype": dtype}
    case = attention_case(seed, device, (507, 123), 2, 1, dim, **sizes)
    check(case.completions(), completion_attention, completion_attention_reference)


@pytest.mark.parametrize(
    ("prefix", "dtype"), [("spread", torch.bfloat16), ("unsorted", torch.float16)], ids=["bf16", "fp16"]
)
def test_many_rows_of_one_token(prefix: str, dtype: torch.dtype, device: torch.device, seed: int):
    """As requests over a history, short prefixes too: several tiles of the sizes that half precision has."""
    case = attention_case(seed, device, (300, 40), 2, 1, 64, group=(150, 90), prefix=prefix, dtype=dtype)
    check(case.completions(), completion_attention, completion_attention_reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("prefix", ["random", "unsorted"])
def test_keys_beyond_a_prefix_change_no_bit_of_its_row(
    prefix: str, dtype: torch.dtype, device: torch.device, seed: int
):
    """And get a gradient of exactly 0 from it; rows of longer prefixes share its tile."""
    sizes: dict[str, Any] = {"group": (24,), "new": 2, "seen": 3, "prefix": prefix, "dtype": dtype}
    case = attention_case(seed, device, (150,), 2, 1, 64, **sizes)
    part = case.completions()
    out = completion_attention(*part.tensors, *part.layout)
    query, *prompt_keys, own_key, own_value = part.tensors
    for row in (0, 11, 23):
        shown = int(case.prefix[row])
        keys, values = (torch.cat([x[:shown], 50 * torch.randn_like(x[shown:])]) for x in prompt_keys)
        again = completion_attention(query, keys, values, own_key, own_value, *part.layout)
        assert torch.equal(again[row], out[row])
        alone = torch.zeros_like(part.grad)
        alone[row] = part.grad[row]
        _, _, dk, dv, *_ = gradients(completion_attention, replace(part, grad=alone), dtype)
        assert not dk[shown:].any() and not dv[shown:].any()
        assert shown == 0 or (dk[:shown].any() and dv[:shown].any())


def test_sorted_rows_skip_what_none_of_a_tile_sees(device: torch.device, seed: int):
    """NaN in keys beyond the largest prefix of a tile, or in rows that do not reach a block of keys, has no effect."""
    case = attention_case(seed, device, (160,), 1, 1, 32, group=32, prefix="spread")  # a tile has 16 rows in float32
    part = case.completions()
    clean = gradients(completion_attention, part, torch.float32)
    query, *prompt_keys, own_key, own_value = part.tensors
    half = int(case.prefix[15])
    keys, values = (x.clone() for x in prompt_keys)
    keys[half:] = values[half:] = torch.nan
    out = completion_attention(query, keys, values, own_key, own_value, *part.layout)
    assert torch.equal(out[:16], clean[0][:16]) and out[16:].isnan().any()
    grad = part.grad.clone()
    grad[:16] = torch.nan
    _, _, dk, dv, *_ = gradients(completion_attention, replace(part, grad=grad), torch.float32)
    assert half % 16 == 0, "a block of keys"
    assert torch.equal(dk[half:], clean[2][half:]) and torch.equal(dv[half:], clean[3][half:])
    assert dk[:half].isnan().any()


@pytest.mark.parametrize("prefix", ["random", "unsorted"])
def test_runs_are_bit_equal(prefix: str, device: torch.device, seed: int):
    sizes: dict[str, Any] = {"group": 3, "new": 2, "seen": 3, "prefix": prefix, "dtype": torch.bfloat16}
    case = attention_case(seed, device, (130, 40), 2, 1, 64, **sizes)
    check_bits(case.completions(), completion_attention)


def test_operators_are_registered_for_compilation(device: torch.device, seed: int):
    case = attention_case(seed, device, (20, 9), 2, 1, 32, group=2, new=1, seen=2)
    check_operators(case.completions(), "completion_attention")


def test_what_is_unsupported_raises(device: torch.device, seed: int):
    part = attention_case(seed, device, (9, 4), 4, 2, 32, group=2, new=1, seen=2).completions()
    query, prompt_key, prompt_value, own_key, own_value = part.tensors
    keys = prompt_key, prompt_value, own_key, own_value
    with pytest.raises(ValueError, match="own_key: found 2 tokens a completion, expected at least the 3 of query"):
        completion_attention(query.expand(-1, 3, -1, -1), *keys, *part.layout)
    none = own_key[:, :0], own_value[:, :0]
    with pytest.raises(ValueError, match="own_key: found 0 tokens a completion, expected at least the 1 of query"):
        completion_attention(query, prompt_key, prompt_value, *none, *part.layout)
    prompts, completions, prefix = part.layout
    with pytest.raises(ValueError, match=r"prompts\.offsets: found torch\.int64"):
        completion_attention(query, *keys, replace(prompts, offsets=prompts.offsets.long()), completions, prefix)
    with pytest.raises(ValueError, match=r"completions\.offsets: found shape"):
        completion_attention(query, *keys, prompts, replace(completions, offsets=completions.offsets[1:]), prefix)
    with pytest.raises(ValueError, match=r"prefix: found torch\.int64"):
        completion_attention(query, *keys, prompts, completions, prefix.long())
    with pytest.raises(ValueError, match=r"prefix: found shape \(3,\), expected \(4,\)"):
        completion_attention(query, *keys, prompts, completions, prefix[1:])
