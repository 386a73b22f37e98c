"""Inference in the core: against float64, and to the bit whatever is computed beside a row."""

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from negfast import _core
from negfast.errors import InputError
from negfast.model.inference import Inference, summed_rows
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.model.qwen3 import Qwen3
from negfast.model.verdict import Verdict
from negfast.sid.tokens import CodeVocabulary

SIZES = {  # hidden, heads, kv heads, head dim, intermediate
    "built-in": (128, 4, 2, 32, 384),
    "small": (32, 2, 1, 16, 48),
    "odd": (27, 3, 3, 10, 45),
    "wide heads": (64, 2, 1, 64, 40),
}


def policy_of(hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, layers: int = 3) -> Policy:
    torch.manual_seed(0)
    config = SimpleNamespace(
        model_type="qwen3",
        attention_bias=False,
        hidden_act="silu",
        use_sliding_window=False,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        vocab_size=16,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"},
    )
    policy = Policy(Qwen3(config), CodeVocabulary(16, 3, 8))
    with torch.no_grad():
        for name, weight in policy.decoder.named_parameters():
            weight.copy_(1 + 0.2 * torch.randn_like(weight) if weight.ndim == 1 else torch.randn_like(weight) * 0.1)
            assert name
    return policy.eval().requires_grad_(False)


def in_float64(policy: Policy, tokens: np.ndarray) -> np.ndarray:
    """Final hidden states [n, d] of a sequence of sums of tokens [n, S], written down as the papers do."""
    config = policy.decoder.config
    weights = {name: x.double().numpy() for name, x in policy.state_dict().items()}
    rows, base = weights["block.rows"], policy.vocabulary.base
    none = policy.vocabulary.marker("none")
    x = np.array([sum(rows[t - base] for t in row if t != none) for row in tokens])
    power = np.arange(0, config.head_dim, 2) / config.head_dim
    angle = np.arange(len(x))[:, None] * 10_000.0**-power
    cos, sin = (np.tile(f(angle), 2)[:, None] for f in (np.cos, np.sin))

    def norm(y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def turned(y: np.ndarray) -> np.ndarray:
        first, second = np.split(y, 2, axis=-1)
        return y * cos + np.concatenate([-second, first], -1) * sin

    for number in range(config.num_hidden_layers):
        of = {name.split(f"layers.{number}.")[1]: w for name, w in weights.items() if f"layers.{number}." in name}
        y = norm(x, of["input_layernorm.weight"])
        query, key, value = (
            (y @ of[f"self_attn.{name}_proj.weight"].T).reshape(len(x), -1, config.head_dim) for name in "qkv"
        )
        query = turned(norm(query, of["self_attn.q_norm.weight"]))
        key = turned(norm(key, of["self_attn.k_norm.weight"]))
        times = config.num_attention_heads // config.num_key_value_heads
        key, value = (np.repeat(part, times, axis=1) for part in (key, value))
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(config.head_dim)
        scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
        share = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", share / share.sum(-1, keepdims=True), value).reshape(len(x), -1)
        x = x + mixed @ of["self_attn.o_proj.weight"].T
        y = norm(x, of["post_attention_layernorm.weight"])
        gate, up = (y @ of[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ of["mlp.down_proj.weight"].T
    return norm(x, weights["decoder.norm.weight"])


def tokens_of(policy: Policy, rng: np.random.Generator, *shape: int) -> torch.Tensor:
    names = policy.vocabulary
    tokens = rng.integers(names.base, names.base + names.size, (*shape, 3))
    tokens[..., 2] = names.marker("none")
    return torch.from_numpy(tokens)


LENGTHS = [7, 1, 70, 33]
PROMPT = np.array([0, 0, 2, 2, 2, 2, 3])
PREFIX = np.array([7, 3, 1, 69, 70, 70, 33])


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bfloat16(request, monkeypatch) -> bool:
    if request.param and not _core.HAS_BFLOAT16:
        pytest.skip("this CPU does not multiply bfloat16 numbers")
    monkeypatch.setattr(_core, "HAS_BFLOAT16", request.param)
    return request.param


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("together", [True, False], ids=["in one call", "after the prompts"])
def test_states_are_those_in_float64(sizes, together, bfloat16):
    """Of completions of two calls: two tokens each, then one more."""
    policy, rng = policy_of(*sizes), np.random.default_rng(0)
    prompts, new = tokens_of(policy, rng, sum(LENGTHS)), tokens_of(policy, rng, len(PROMPT), 3)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    layout = GroupLayout.build(starts, torch.device("cpu"))
    with torch.inference_mode():
        assert policy.inference.of(policy.decoder) is not None
        if not together:
            of_prompts = policy.hidden(layout, prompts, None)
            for start, end in pairwise(starts):
                check(of_prompts[start:end].numpy(), in_float64(policy, prompts[start:end].numpy()), bfloat16)
        layout.ask(PROMPT, PREFIX)
        parts = [
            policy.hidden(layout, prompts if together else None, new[:, :2]),
            policy.hidden(layout, None, new[:, 2:]),
        ]
    found = torch.cat([part.view(len(PROMPT), -1, sizes[0]) for part in parts], dim=1).numpy()
    for row, (prompt, prefix) in enumerate(zip(PROMPT, PREFIX, strict=True)):
        sequence = torch.cat([prompts[starts[prompt] : starts[prompt] + prefix], new[row]])
        check(found[row], in_float64(policy, sequence.numpy())[-3:], bfloat16)


def check(found: np.ndarray, expected: np.ndarray, bfloat16: bool) -> None:
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (8e-3 if bfloat16 else 1e-6)
    assert error > 1e-9 if bfloat16 else True


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_row_does_not_depend_on_its_neighbours(sizes, bfloat16):
    """To the bit: alone or among 300, and as a position of a prompt or of a completion that extends it."""
    policy, rng = policy_of(*sizes), np.random.default_rng(1)
    prompt, asked = tokens_of(policy, rng, 40), tokens_of(policy, rng, 300, 1)

    def states(layout: GroupLayout, rows: torch.Tensor) -> torch.Tensor:
        layout.ask(np.zeros(len(rows), np.int64))
        return policy.hidden(layout, None, rows)

    with torch.inference_mode():
        whole = GroupLayout.build(np.array([0, 40]), torch.device("cpu"))
        read = policy.hidden(whole, prompt, None)
        together = states(whole, asked)
        assert torch.equal(together[17:18], states(whole, asked[17:18]))
        part = GroupLayout.build(np.array([0, 35]), torch.device("cpu"))
        policy.hidden(part, prompt[:35], None)
        assert torch.equal(states(part, prompt[None, 35:]), read[35:])


def test_several_threads_give_the_same_bits():
    policy, rng = policy_of(*SIZES["built-in"]), np.random.default_rng(2)
    tokens, before = tokens_of(policy, rng, 3000), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                layout = GroupLayout.build(np.arange(0, 3001, 100), torch.device("cpu"))
                found.append(policy.hidden(layout, tokens, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_weights_that_change_are_followed():
    """In place, as an optimiser or a checkpoint does; and a copy has its own."""
    policy, rng = policy_of(*SIZES["small"]), np.random.default_rng(3)
    tokens = tokens_of(policy, rng, 5)

    def states(of: Policy) -> torch.Tensor:
        with torch.inference_mode():
            return of.hidden(GroupLayout.build(np.array([0, 5]), torch.device("cpu")), tokens, None)

    before = states(policy)
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        policy.decoder.layers[1].mlp.up_proj.weight.mul_(2)
    assert not torch.allclose(states(policy), before)
    assert torch.equal(states(twin), before)


def test_decoders_that_it_does_not_take():
    assert Inference.of(policy_of(*SIZES["small"]).decoder) is not None
    assert Inference.of(policy_of(*SIZES["small"]).double().decoder) is None
    policy = policy_of(*SIZES["small"])
    policy.decoder.config.model_type = "llama"
    assert Inference.of(policy.decoder) is None
    policy = policy_of(*SIZES["small"])
    policy.decoder.layers[0].mlp.up_proj = torch.nn.Sequential(policy.decoder.layers[0].mlp.up_proj)
    assert Inference.of(policy.decoder) is None


def test_the_verdict_is_that_in_float64():
    torch.manual_seed(4)
    verdict = Verdict(23)
    edges = torch.randn(23, verdict.edges.shape[1]).sort(dim=1).values
    edges[3, 4:8] = edges[3, 4]  # bins of no width, inside and at both ends
    edges[4, :3], edges[5, -3:], edges[6] = edges[4, 0], edges[5, -1], 0.0
    verdict.edges.copy_(edges)
    with torch.no_grad():
        for weight in verdict.parameters():
            weight.normal_(std=0.2)
    features = torch.randn(500, 23) * 2
    features[::7, ::3] = torch.nan
    features[:17, 8] = edges[8]  # at the edges
    with torch.inference_mode():
        found = verdict(features)
        alone = verdict(features[7:8])
    expected = copy.deepcopy(verdict).double()(features.double())
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert torch.equal(alone[0], found[7])


def test_sums_of_rows():
    table, places = torch.randn(9, 21), torch.tensor([[0, 8, 3], [3, 3, 3], [1, 3, 1]])
    expected = summed_rows(table, places, 3)
    with torch.inference_mode():
        assert torch.equal(summed_rows(table, places, 3), expected)
        with pytest.raises(InputError, match=r"outside 0\.\.9"):
            summed_rows(table, places + 6, 3)


def test_shapes_that_do_not_fit_are_refused():
    core = Inference(policy_of(*SIZES["small"]).decoder).core
    rows, none = np.zeros((2, 2, 16), np.float32), np.zeros((0, 1, 16), np.float32)
    keys, prompt, prefix = np.zeros((4, 1, 16), np.float32), np.zeros(2, np.int64), np.array([4, 2], np.int32)
    good: dict[str, Any] = {"query": rows, "key": keys, "value": keys, "offsets": np.array([0, 4], np.int32)}
    good |= {"prompt": prompt, "prefix": prefix, "own_key": none, "own_value": none, "out": rows.copy(), "threads": 1}
    core.attend(**good)
    bad = {"prefix": prefix + 1, "prompt": prompt + 1, "key": keys[:3], "own_key": keys[:1], "query": rows[:1]}
    for name, value in bad.items():
        with pytest.raises(InputError, match="found"):
            core.attend(**{**good, name: value})
    with pytest.raises(InputError, match="layer: found 9"):
        core.finish(9, rows, np.zeros((2, 32), np.float32), 1)
    with pytest.raises(InputError, match="sizes that do not fit"):
        _core.Decoder(32, 3, 2, 16, 48, 1e-6, False)
