"""The group pass against separate full forwards of the stock model: log-probabilities and gradients."""

from dataclasses import dataclass, replace
from typing import Any

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


@dataclass
class Case:
    """Prompts, and completions of prefixes of them."""

    prompts: list[torch.Tensor]
    prompt: np.ndarray  # int64 [A], ascending
    prefix: np.ndarray  # int64 [A]
    completions: torch.Tensor  # int64 [A, n]

    @classmethod
    def random(cls, policy: Policy, prompts: int, counts: np.ndarray, length: int, whole: bool) -> "Case":
        lengths = torch.randint(1, 23, (prompts,)).numpy()
        prompt = np.repeat(np.arange(prompts), counts)
        prefix = lengths[prompt] if whole else torch.randint(0, 23, (len(prompt),)).numpy() % (lengths[prompt] + 1)
        prefix = prefix[np.lexsort((prefix, prompt))]
        return cls(
            [random_tokens(policy, n) for n in lengths], prompt, prefix, random_tokens(policy, len(prompt), length)
        )


def separate_forwards(policy: Policy, case: Case) -> torch.Tensor:
    """Hidden states [A, n, d] of the completions by one causal forward of the stock model each."""
    policy.decoder.set_attn_implementation("sdpa")  # eager takes its softmax in fp32
    rows = []
    for prompt, prefix, completion in zip(case.prompt, case.prefix, case.completions, strict=True):
        tokens = torch.cat([case.prompts[prompt][:prefix], completion])
        out = policy.decoder(inputs_embeds=policy.embed(tokens, True).unsqueeze(0), use_cache=False)
        rows.append(out.last_hidden_state[0, prefix:])
    policy.decoder.set_attn_implementation("negfast_group")
    return torch.stack(rows)


def group_forward(policy: Policy, case: Case, calls: str) -> torch.Tensor:
    """The same in one call, in a call a token, or in calls that ask twice of the same prompts."""
    layout = GroupLayout.build(np.cumsum([0] + [len(p) for p in case.prompts]), torch.device("cpu"))
    tokens, completions, length = torch.cat(case.prompts), case.completions, case.completions.shape[1]
    if calls == "asked twice":
        first = np.arange(len(completions)) % 3 == 0
        states = torch.empty(len(completions), length, SHAPE["hidden_size"], dtype=policy.block.rows.dtype)
        for rows in (first, ~first):
            if rows.any():
                layout.ask(case.prompt[rows], case.prefix[rows])
                hidden = policy.hidden(layout, tokens if not layout.keys else None, completions[rows], True)
                states = states.index_copy(0, torch.from_numpy(rows.nonzero()[0]), hidden.view(-1, *states.shape[1:]))
        return states
    layout.ask(case.prompt, case.prefix)
    if calls == "one":
        return policy.hidden(layout, tokens, completions, True).view(*completions.shape, -1)
    each = [
        policy.hidden(layout, None if level else tokens, completions[:, level : level + 1], True)
        for level in range(length)
    ]
    return torch.stack(each, 1)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("calls", ["one", "one a token", "asked twice"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("branches", ["one", "many", "of the whole"])
def test_equals_separate_forwards_in_fp64(exact_norms, kind, calls, length, branches):
    policy = make_policy(kind, torch.float64)
    counts = {"one": np.ones(4), "many": np.array([7, 0, 2, 16]), "of the whole": np.array([2, 0, 5, 1])}[branches]
    case = Case.random(policy, 4, counts.astype(int), length, branches == "of the whole")
    weight = torch.randn(len(case.prompt), length, SHAPE["hidden_size"], dtype=torch.float64)

    expected = separate_forwards(policy, case)
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    wanted = torch.autograd.grad((weight * expected).sum(), list(trained.values()), allow_unused=True)
    found = group_forward(policy, case, calls)
    gradients = torch.autograd.grad((weight * found).sum(), list(trained.values()), allow_unused=True)

    assert relative_error(found, expected) < 1e-10
    for name, want, got in zip(trained, wanted, gradients, strict=True):
        assert (want is None) == (got is None), name
        if want is not None:
            assert relative_error(got, want) < 1e-10, name


@pytest.mark.parametrize("trimmed", [True, False])
def test_copies_of_a_branch_continue_it(exact_norms, trimmed):
    policy = make_policy("qwen3", torch.float64)
    if not trimmed:  # as for a decoder whose layers have other parts
        policy.decoder.layers[-1]._forward_pre_hooks.clear()
        policy.drops_prompt_rows = False
    case = Case.random(policy, 3, np.array([2, 1, 3]), 1, False)
    after = random_tokens(policy, 24, 1)
    layout = GroupLayout.build(np.cumsum([0] + [len(p) for p in case.prompts]), torch.device("cpu"))
    layout.ask(case.prompt, case.prefix)
    policy.hidden(layout, torch.cat(case.prompts), case.completions, True)
    kept = torch.tensor([0, 1, 5, 7, 11, 12, 23])
    layout.branch(kept // 4, 4, kept)
    found = policy.hidden(layout, None, after[kept], True)
    parents = kept.numpy() // 4
    both = torch.cat([case.completions[parents], after[kept]], 1)
    expected = separate_forwards(policy, Case(case.prompts, case.prompt[parents], case.prefix[parents], both))
    assert relative_error(found, expected[:, 1]) < 1e-10


def test_what_lies_at_or_after_a_prefix_changes_no_bit():
    policy = make_policy("qwen3", torch.float32)
    case = Case.random(policy, 4, np.array([3, 5, 1, 8]), 2, False)
    found = group_forward(policy, case, "one")
    for row, (prompt, prefix) in enumerate(zip(case.prompt, case.prefix, strict=True)):
        later = [p.clone() for p in case.prompts]
        later[prompt][prefix:] = random_tokens(policy, len(later[prompt]) - prefix)
        changed = group_forward(policy, replace(case, prompts=later), "one")
        assert (changed[row] == found[row]).all()


def test_sums_are_of_their_rows():
    policy = make_policy("qwen3", torch.float64)
    vocabulary = policy.vocabulary
    tokens = torch.randint(vocabulary.base, vocabulary.base + vocabulary.size, (9, 4))
    tokens[2:5, 1:] = tokens[8] = vocabulary.marker("none")
    rows = policy.block.rows * (torch.arange(vocabulary.size) != 0)[:, None]  # <|none|> is the first
    found = policy.embed(tokens)
    assert relative_error(found, rows[tokens - vocabulary.base].sum(1)) < 1e-12
    assert (found[8] == 0).all()


def test_equals_separate_forwards_in_the_stock_model():
    policy = make_policy("qwen3", torch.float32)
    case = Case.random(policy, 3, np.full(3, 4), 3, False)
    assert relative_error(group_forward(policy, case, "one a token"), separate_forwards(policy, case)) < 1e-6


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
