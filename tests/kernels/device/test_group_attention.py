"""Group attention against float64: outputs and gradients never further off than eager code in the same dtype."""

import pytest
import torch
from cases import AttentionCase, attention_case, relative_error
from negfast.kernels import answer_attention as answers_module
from negfast.kernels import prompt_attention as prompts_module
from negfast.kernels.answer_attention import answer_attention, answer_attention_reference
from negfast.kernels.prompt_attention import prompt_attention, prompt_attention_reference

ROUNDING = 3e-6


def gradients(function, case: AttentionCase, dtype: torch.dtype, *arguments) -> list[torch.Tensor]:
    """The output and the gradients of every tensor, for a fixed random gradient of the output."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in case.tensors]
    out = function(*leaves, *arguments)
    return [out, *torch.autograd.grad(out, leaves, case.grad.to(dtype))]


def check(case: AttentionCase, kernel, reference) -> None:
    scale = case.tensors[0].shape[-1] ** -0.5
    dtype = case.tensors[0].dtype
    truth = gradients(reference, case, torch.float64, *case.offsets, scale)
    eager = gradients(reference, case, dtype, *case.offsets, scale)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        found = gradients(kernel, case, dtype, *case.offsets, *case.sizes)
    finally:
        torch.use_deterministic_algorithms(False)
    for n, (kernel_out, eager_out, right) in enumerate(zip(found, eager, truth, strict=True)):
        name = "out" if n == 0 else f"gradient of tensor {n - 1}"
        assert kernel_out.shape == right.shape and kernel_out.dtype == dtype, name
        error, allowed = relative_error(kernel_out, right), relative_error(eager_out, right)
        assert error <= 1.1 * allowed + ROUNDING, f"{name}: {error:.2e}, eager {allowed:.2e}"


@pytest.mark.parametrize("lengths", [(1, 3), (63, 64, 65), (123, 2, 17)], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_prompts(lengths: tuple[int, ...], dim: int, device: torch.device, seed: int):
    check(attention_case(seed, device, lengths, 2, 1, dim).prompts(), prompt_attention, prompt_attention_reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_prompts_in_half_precision(dtype: torch.dtype, device: torch.device, seed: int):
    case = attention_case(seed, device, (252, 130), 4, 2, 64, dtype=dtype)
    check(case.prompts(), prompt_attention, prompt_attention_reference)


@pytest.mark.parametrize("group", [1, 3, 64])
@pytest.mark.parametrize(("new", "seen"), [(1, 1), (1, 3), (3, 3), (2, 4)], ids=str)
def test_answers(group: int, new: int, seen: int, device: torch.device, seed: int):
    lengths, heads = ((70, 1, 33), 4) if group < 64 else ((70,), 2)
    case = attention_case(seed, device, lengths, heads, heads // 2, 64, group=group, new=new, seen=seen)
    check(case.answers(), answer_attention, answer_attention_reference)


@pytest.mark.parametrize("groups", [(5, 0, 17), (0, 0, 1), (1, 40, 0)], ids=str)
@pytest.mark.parametrize(("new", "seen"), [(1, 2), (3, 3)], ids=str)
def test_prompts_with_different_numbers_of_answers(
    groups: tuple[int, ...], new: int, seen: int, device: torch.device, seed: int
):
    case = attention_case(seed, device, (40, 7, 65), 2, 1, 32, group=groups, new=new, seen=seen)
    check(case.answers(), answer_attention, answer_attention_reference)


@pytest.mark.parametrize("new", [1, 2])
def test_queries_that_see_the_prompt_alone(new: int, device: torch.device, seed: int):
    """As a prompt's last token does; one prompt is much shorter than the splits of the longest."""
    case = attention_case(seed, device, (300, 1, 33), 4, 2, 32, new=new, seen=0)
    check(case.answers(), answer_attention, answer_attention_reference)


def test_no_answers_at_all(device: torch.device, seed: int):
    part = attention_case(seed, device, (4, 3), 2, 1, 32, group=0).answers()
    assert answer_attention(*part.tensors, *part.offsets, *part.sizes).shape == (0, 1, 2, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_answers_in_half_precision(dtype: torch.dtype, dim: int, device: torch.device, seed: int):
    case = attention_case(seed, device, (507, 123), 2, 1, dim, group=5, new=3, seen=3, dtype=dtype)
    check(case.answers(), answer_attention, answer_attention_reference)


def test_runs_are_bit_equal(device: torch.device, seed: int):
    case = attention_case(seed, device, (130, 40), 2, 1, 64, group=3, new=2, seen=3, dtype=torch.bfloat16)
    for part, kernel in ((case.prompts(), prompt_attention), (case.answers(), answer_attention)):
        first = gradients(kernel, part, torch.bfloat16, *part.offsets, *part.sizes)
        again = gradients(kernel, part, torch.bfloat16, *part.offsets, *part.sizes)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_operators_are_registered_for_compilation(device: torch.device, seed: int):
    case = attention_case(seed, device, (20, 9), 2, 1, 32, group=2, new=1, seen=2)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for part, operator in ((case.prompts(), prompts_module._forward), (case.answers(), answers_module._forward)):
        leaves = [tensor.clone().requires_grad_() for tensor in part.tensors]
        torch.library.opcheck(operator, (*leaves, *part.offsets, *part.sizes, 0.2), test_utils=checks)


def test_what_is_unsupported_raises(device: torch.device, seed: int):
    case = attention_case(seed, device, (9, 4), 4, 2, 32, group=2, new=1, seen=2)
    query, key, value = case.prompts().tensors
    for message, arguments in {
        "head dimension: found 24": (query[..., :24], key[..., :24], value[..., :24]),
        "query heads: found 3": (query[:, :3], key, value),
        r"query: found torch\.float64": (query.double(), key.double(), value.double()),
        r"key: found torch\.bfloat16": (query, key.bfloat16(), value),
        "value: found shape": (query, key, value[1:]),
    }.items():
        with pytest.raises(ValueError, match=message):
            prompt_attention(*arguments, *case.prompts().offsets, 9)
    part = case.answers()
    query, key, value, own_key, own_value = part.tensors
    three = query.expand(-1, 3, -1, -1)
    with pytest.raises(ValueError, match="own_key: found 2 tokens an answer, expected none or at least the 3"):
        answer_attention(three, key, value, own_key, own_value, *part.offsets, *part.sizes)
    cu_seqlens, answer_offsets = part.offsets
    with pytest.raises(ValueError, match=r"cu_seqlens: found torch\.int64"):
        answer_attention(*part.tensors, cu_seqlens.long(), answer_offsets, *part.sizes)
    with pytest.raises(ValueError, match="answer_offsets: found shape"):
        answer_attention(*part.tensors, cu_seqlens, answer_offsets[1:], *part.sizes)
