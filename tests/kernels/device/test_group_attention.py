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
    truth = gradients(reference, case, torch.float64, case.cu_seqlens, scale)
    eager = gradients(reference, case, dtype, case.cu_seqlens, scale)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        found = gradients(kernel, case, dtype, case.cu_seqlens, case.longest)
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
    lengths = (70, 1, 33) if group < 64 else (70,)
    case = attention_case(seed, device, lengths, 4, 2, 64, group=group, new=new, seen=seen)
    check(case.answers(), answer_attention, answer_attention_reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_answers_in_half_precision(dtype: torch.dtype, dim: int, device: torch.device, seed: int):
    case = attention_case(seed, device, (507, 123), 2, 1, dim, group=5, new=3, seen=3, dtype=dtype)
    check(case.answers(), answer_attention, answer_attention_reference)


def test_runs_are_bit_equal(device: torch.device, seed: int):
    case = attention_case(seed, device, (130, 40), 4, 2, 64, group=3, new=2, seen=3, dtype=torch.bfloat16)
    for part, kernel in ((case.prompts(), prompt_attention), (case.answers(), answer_attention)):
        first = gradients(kernel, part, torch.bfloat16, case.cu_seqlens, case.longest)
        again = gradients(kernel, part, torch.bfloat16, case.cu_seqlens, case.longest)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_operators_are_registered_for_compilation(device: torch.device, seed: int):
    case = attention_case(seed, device, (20, 9), 2, 1, 32, group=2, new=1, seen=2)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for part, operator in ((case.prompts(), prompts_module._forward), (case.answers(), answers_module._forward)):
        leaves = [tensor.clone().requires_grad_() for tensor in part.tensors]
        torch.library.opcheck(operator, (*leaves, case.cu_seqlens, case.longest, 0.2), test_utils=checks)


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
            prompt_attention(*arguments, case.cu_seqlens, case.longest)
    query, key, value, own_key, own_value = case.answers().tensors
    with pytest.raises(ValueError, match="own_key: found 0 tokens"):
        answer_attention(query, key, value, own_key[:, :, :0], own_value[:, :, :0], case.cu_seqlens, case.longest)
    with pytest.raises(ValueError, match=r"cu_seqlens: found torch\.int64"):
        answer_attention(query, key, value, own_key, own_value, case.cu_seqlens.long(), case.longest)
