"""The group pass against G separate full forwards of the stock model: log-probabilities and gradients."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from negfast.errors import InputError
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.sid.tokens import CodeVocabulary

SHAPE: dict[str, Any] = dict(
    vocab_size=40,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=256,
)


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers' RMSNorm works in fp32 whatever its input; here it works in the input's own dtype."""

    def forward(self, hidden_states):
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", forward)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def make_policy(kind: str, dtype: torch.dtype) -> Policy:
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)) if kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**SHAPE))
    policy = Policy(model, CodeVocabulary(SHAPE["vocab_size"], 4, 16)).to(dtype)
    torch.nn.init.normal_(policy.block.head.weight, std=0.2)
    torch.nn.init.normal_(policy.block.rows, std=0.3)
    return policy.eval()


def random_tokens(policy: Policy, *shape: int) -> torch.Tensor:
    return torch.randint(0, policy.vocabulary.base + policy.vocabulary.size, shape)


def separate_forwards(policy: Policy, prompts: list[torch.Tensor], completions: torch.Tensor, group: np.ndarray):
    """log p of every completion token [A, L] over the full vocabulary by one causal forward of the stock model each."""
    policy.decoder.set_attn_implementation("sdpa")  # eager takes its softmax in fp32
    owner = np.repeat(np.arange(len(prompts)), group)
    rows = []
    for a, b in enumerate(owner):
        tokens = torch.cat([prompts[b], completions[a]])
        out = policy.decoder(inputs_embeds=policy.embed(tokens, True).unsqueeze(0), use_cache=False)
        hidden = out.last_hidden_state[0, len(prompts[b]) - 1 : -1]
        rows.append(policy.full_logits(hidden).log_softmax(-1).gather(-1, completions[a][:, None])[:, 0])
    policy.decoder.set_attn_implementation("negfast_group")
    return torch.stack(rows)


def group_forward(policy: Policy, prompts: list[torch.Tensor], completions: torch.Tensor, group: np.ndarray, mode: str):
    """The same through one prompt pass and one pass a level (single-pass), or all in one call (two-pass)."""
    cu = np.cumsum([0] + [len(p) for p in prompts])
    layout = GroupLayout.build(cu, group, torch.device("cpu"))
    length = completions.shape[1]
    rows: Literal["all", "last"] = "all" if mode.endswith("whole") else "last"
    tokens = int(cu[-1]) if rows == "all" else len(prompts)
    last = layout.last_prompt_row if rows == "all" else torch.arange(len(prompts))
    if mode.startswith("single"):
        each = [policy.hidden(layout, torch.cat(prompts), None, True, rows)[last][layout.completion_prompt]]
        for level in range(length - 1):
            each.append(policy.hidden(layout, None, completions[:, level : level + 1], True))
        states = torch.stack(each, 1)
    else:
        fed = completions[:, :-1] if length > 1 else None
        hidden = policy.hidden(layout, torch.cat(prompts), fed, True, rows)
        first = hidden[last][layout.completion_prompt].unsqueeze(1)
        rest = hidden[tokens:].view(len(completions), length - 1, hidden.shape[-1])
        states = torch.cat([first, rest], 1)
    return policy.full_logits(states).log_softmax(-1).gather(-1, completions[..., None])[..., 0]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("mode", ["single-pass", "two-pass", "single-pass-whole", "two-pass-whole"])
@pytest.mark.parametrize("length", [1, 3, 4])
@pytest.mark.parametrize("group", [1, 3, 16, "ragged"])
def test_equals_separate_forwards_in_fp64(exact_norms, kind, mode, length, group):
    policy = make_policy(kind, torch.float64)
    lengths = torch.randint(1, 23, (4,)).numpy() if group != 3 else np.full(4, 9)
    counts = np.array([2, 0, 5, 1]) if group == "ragged" else np.full(4, group)
    prompts = [random_tokens(policy, n) for n in lengths]
    completions = random_tokens(policy, counts.sum(), length)
    weight = torch.randn(counts.sum(), length, dtype=torch.float64)

    expected = separate_forwards(policy, prompts, completions, counts)
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    wanted = torch.autograd.grad((weight * expected).sum(), list(trained.values()), allow_unused=True)
    found = group_forward(policy, prompts, completions, counts, mode)
    gradients = torch.autograd.grad((weight * found).sum(), list(trained.values()), allow_unused=True)

    assert relative_error(found, expected) < 1e-9
    for name, want, got in zip(trained, wanted, gradients, strict=True):
        assert (want is None) == (got is None), name
        if want is not None:
            assert relative_error(got, want) < 1e-9, name


@pytest.mark.parametrize("trimmed", [True, False])
def test_prompt_rows_are_a_choice_of_the_whole(trimmed):
    policy = make_policy("qwen3", torch.float64)
    if not trimmed:  # as for a decoder whose layers have other parts
        policy.decoder.layers[-1]._forward_pre_hooks.clear()
        policy.drops_prompt_rows = False
    cu = np.array([0, 3, 11, 12, 30])
    tokens, completions = random_tokens(policy, 30), random_tokens(policy, 8, 2)

    def hidden(rows):
        return policy.hidden(GroupLayout.build(cu, 2, torch.device("cpu")), tokens, completions, True, rows)

    whole = hidden("all")
    assert relative_error(hidden("none"), whole[30:]) < 1e-9
    assert relative_error(hidden("last"), torch.cat([whole[cu[1:] - 1], whole[30:]])) < 1e-9


def test_equals_separate_forwards_in_the_stock_model():
    policy = make_policy("qwen3", torch.float32)
    counts = np.full(3, 4)
    prompts = [random_tokens(policy, n) for n in (5, 17, 30)]
    completions = random_tokens(policy, 12, 3)
    expected = separate_forwards(policy, prompts, completions, counts)
    found = group_forward(policy, prompts, completions, counts, "single-pass")
    assert relative_error(found, expected) < 1e-6


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def test_sliding_window_and_checkpointing_raise():
    config = Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(InputError, match="sliding"):
        Policy(Qwen3ForCausalLM(config), CodeVocabulary(40, 3, 16))
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="checkpointing"):
        Policy(model, CodeVocabulary(40, 3, 16))
