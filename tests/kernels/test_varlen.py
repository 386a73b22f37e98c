"""Who computes the attention of prompts on a GPU; the libraries' calls with the signatures that they have."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from negfast.kernels import varlen
from negfast.kernels.attention_inputs import Segments
from negfast.kernels.prompt_attention_reference import prompt_attention_reference

ASKED: list[dict] = []


def flash_attn_varlen_func(  # of flash-attn 2.8
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
) -> Tensor:  # fmt: skip
    ASKED.append({"causal": causal, "deterministic": deterministic, "longest": max_seqlen_q})
    return prompt_attention_reference(q, k, v, Segments(cu_seqlens_q, max_seqlen_k), softmax_scale)


def varlen_attn(  # of torch 2.13
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
) -> Tensor:  # fmt: skip
    assert enable_gqa and window_size == (-1, 0)
    out = prompt_attention_reference(query, key, value, Segments(cu_seq_q, max_k), scale)
    if out.requires_grad:
        out.register_hook(lambda _: ASKED.append({"deterministic": torch.are_deterministic_algorithms_enabled()}))
    return out


@pytest.fixture
def heads() -> tuple[tuple[Tensor, Tensor, Tensor], Segments]:
    offsets = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    query, key, value = (torch.randn(13, n, 32, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    return (query, key, value), Segments(offsets, 7)


@pytest.mark.parametrize("name", ["flash-attn", "torch"])
def test_calls(name, heads, monkeypatch):
    module = ModuleType("stub")
    if name == "torch":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        call = varlen._varlen_attn
    else:
        module.__dict__["flash_attn_varlen_func"] = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        call = varlen._flash_attn
    (q, k, v), prompts = heads
    ASKED.clear()
    grad = torch.randn(13, 4, 32, dtype=torch.float64)
    expected = prompt_attention_reference(q, k, v, prompts, 0.3)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    found = call(q, k, v, prompts, 0.3)
    gradients = torch.autograd.grad(found, (q, k, v), grad)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradients, wanted))
    assert ASKED[-1]["deterministic"] and not torch.are_deterministic_algorithms_enabled()
    with torch.no_grad():
        assert torch.equal(call(q, k, v, prompts, 0.3), expected)


@pytest.mark.parametrize(
    ("flash", "torch_has_it", "expected"),
    [(True, True, "flash-attn 2.8.3"), (False, True, f"torch {torch.__version__}"), (False, False, "triton")],
)
def test_choice(flash, torch_has_it, expected, monkeypatch):
    monkeypatch.setattr(varlen, "find_spec", lambda name: True if flash or name != "flash_attn" else None)
    monkeypatch.setattr(varlen, "version", lambda _: "2.8.3")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: torch_has_it)
    varlen.library.cache_clear()
    try:
        name, call = varlen.library()
    finally:
        varlen.library.cache_clear()
    assert name.startswith(expected) and (call is None) == (expected == "triton")


def test_float32_and_the_cpu_keep_to_ours(heads, monkeypatch):
    monkeypatch.setattr(varlen, "library", lambda: pytest.fail("asked"))
    (q, k, v), prompts = heads
    expected = prompt_attention_reference(q, k, v, prompts, 0.3)
    assert torch.equal(varlen.causal_attention(q, k, v, prompts, 0.3), expected)
