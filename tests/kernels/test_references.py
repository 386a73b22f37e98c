"""The eager references against slower truths: enumeration, finite differences, full sequences; and bad input."""

import itertools
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

from negfast import kernels
from negfast.kernels import dispatch
from negfast.kernels.completion_attention import completion_attention
from negfast.kernels.prompt_attention_reference import prompt_attention_reference
from negfast.kernels.sid_cross_entropy import sid_cross_entropy
from negfast.kernels.trie_grpo import GRPOObjective, trie_grpo
from negfast.kernels.trie_grpo_reference import SampledTokens, group_advantage, set_shares, trie_grpo_reference
from negfast.kernels.trie_rows_reference import dense_policy, log_policy
from tests.kernels.cases import attention_case, loss_and_gradient, segments_of, trie_case

CPU = torch.device("cpu")


@pytest.mark.parametrize(("levels", "codebook", "items"), [(1, 40, 25), (3, 8, 90), (4, 64, 50)])
@pytest.mark.parametrize("with_prior", [True, False], ids=["prior", "no-prior"])
def test_dense_policy_is_what_enumeration_finds(levels: int, codebook: int, items: int, with_prior: bool, seed: int):
    case = trie_case(
        seed, CPU, levels=levels, codebook=codebook, items=items, with_prior=with_prior, rows=60, seen_items=20
    )
    valid, log_prior = dense_policy(case.tables, case.rows, torch.float64)
    expected_valid = torch.zeros_like(valid)
    expected_prior = torch.zeros(valid.shape, dtype=torch.float64)
    for row, (request, prefix) in enumerate(case.row_prefix):
        for code, unseen in case.trie.choices(prefix, case.request_seen[request]).items():
            expected_valid[row, code] = True
            if with_prior:
                assert case.rows.mass_start is not None and case.mass is not None
                day = int(case.rows.mass_start[row]) // len(case.trie.index)
                mass = sum(case.mass[day, item] for item in unseen)
                expected_prior[row, code] = 0.8 * np.log(mass + 0.05 * len(unseen))
    assert torch.equal(valid, expected_valid)
    assert not valid[len(case.row_prefix) :].any(), "padding rows have no valid code"
    if with_prior:
        torch.testing.assert_close(log_prior, expected_prior, rtol=2e-5, atol=2e-5)
    else:
        assert log_prior is None


@pytest.mark.parametrize("kl", ["exact", "k3"])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_gradient_is_that_of_finite_differences(kl: str, loss: str, seed: int):
    case = trie_case(seed, CPU, codebook=6, items=40, group=5).to(torch.float64)
    objective = GRPOObjective(loss=loss, kl=kl, beta=0.3, temperature=0.8, clip_low=0.15)
    sampled = loss_and_gradient(case, GRPOObjective(beta=0.0, temperature=0.8)).log_prob
    old = sampled + 0.3 * torch.randn_like(sampled)
    ratio = (sampled - old).exp()
    near_a_kink = ((ratio - 0.85).abs() < 1e-3) | ((ratio - 1.2).abs() < 1e-3)
    old = torch.where(near_a_kink, old + 0.01, old)
    direction = torch.randn_like(case.logits)

    def at(step: float) -> torch.Tensor:
        moved = replace(case, logits=case.logits + step * direction)
        return loss_and_gradient(moved, objective, old_log_prob=old).loss

    dlogits = loss_and_gradient(case, objective, old_log_prob=old).dlogits
    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    torch.testing.assert_close((dlogits * direction).sum(), difference, rtol=1e-5, atol=1e-7)


def test_cross_entropy_is_that_of_enumerated_choices_and_its_gradient_of_finite_differences(seed: int):
    case = trie_case(seed, CPU).to(torch.float64)
    targets = [min(case.trie.choices(prefix, case.request_seen[request])) for request, prefix in case.row_prefix]
    rest = (case.tables, case.rows, torch.tensor(targets, dtype=torch.int32))
    logits = case.logits.clone().requires_grad_()
    found = sid_cross_entropy(case.logits, *rest)
    assert case.rows.mass_start is not None and case.mass is not None
    for row, (request, prefix) in enumerate(case.row_prefix):
        day = int(case.rows.mass_start[row]) // len(case.trie.index)
        scores = {
            code: float(case.logits[row, code]) + 0.8 * np.log(case.mass[day, unseen].sum() + 0.05 * len(unseen))
            for code, unseen in case.trie.choices(prefix, case.request_seen[request]).items()
        }
        expected = np.logaddexp.reduce(list(scores.values())) - scores[targets[row]]
        assert found[row].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert torch.autograd.gradcheck(lambda z: sid_cross_entropy(z, *rest), logits)


@pytest.mark.parametrize(("size", "k"), [(1, 1), (4, 1), (5, 2), (6, 3), (6, 6), (9, 4)])
def test_max_at_k_is_what_enumeration_finds(size: int, k: int, seed: int):
    """k times the mean over sets of k with completion i of (best of the set - best of the set without i)."""
    rewards = (torch.rand(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 4).round() / 4
    found = group_advantage(rewards, GRPOObjective(set_size=k))
    for b, i in itertools.product(range(3), range(size)):
        others = [rewards[b, j].item() for j in range(size) if j != i]
        if k == 1:  # leave-one-out baseline
            expected = rewards[b, i].item() - (sum(others) / len(others) if others else 0.0)
        else:
            rests = list(itertools.combinations(others, k - 1))
            expected = k * sum(max(rewards[b, i].item(), *rest) - max(rest) for rest in rests) / len(rests)
        assert found[b, i].item() == pytest.approx(expected, abs=1e-12)


def test_shares_of_large_groups_are_finite():
    shares = set_shares(4096, 64)
    assert np.isfinite(shares).all() and sum(shares) == pytest.approx(64 * 4096 / 4033)


@pytest.mark.parametrize("prefix", ["full", "zero", "unsorted"])
def test_completions_over_a_shared_prompt_equal_full_sequences(prefix: str, seed: int):
    """As a library without groups computes them: every prefix + completion a sequence of its own."""
    sizes: dict[str, Any] = {"group": (3, 0, 2), "new": 4, "seen": 4, "prefix": prefix, "dtype": torch.float64}
    case = attention_case(seed, CPU, (7, 1, 12), 4, 2, 32, **sizes)
    part = case.completions()
    leaves = [tensor.requires_grad_() for tensor in part.tensors]
    found = completion_attention(*leaves, *part.layout)
    owners = [prompt for prompt, count in enumerate(case.groups) for _ in range(count)]
    prompts = [tensor.split(case.lengths) for tensor in case.prompt]
    outputs = []
    for completion, owner in enumerate(owners):
        shown = int(case.prefix[completion])
        query, key, value = (
            torch.cat([p[owner][:shown], own[completion]]) for p, own in zip(prompts, case.own, strict=True)
        )
        outputs.append(prompt_attention_reference(query, key, value, segments_of((len(query),), CPU))[shown:])
    expected = torch.stack(outputs)
    torch.testing.assert_close(found, expected)
    ours, wanted = (torch.autograd.grad(out, leaves, part.grad) for out in (found, expected))
    torch.testing.assert_close(ours, wanted)


def test_operator_on_the_cpu_is_the_reference(seed: int):
    case = trie_case(seed, CPU).to(torch.float64)
    logits = case.logits.clone().requires_grad_()
    objective = GRPOObjective()
    terms = trie_grpo(logits, case.tables, case.rows, case.tokens, case.rewards, objective, reference=case.reference)
    valid, log_prior = dense_policy(case.tables, case.rows, torch.float64)
    tokens, levels = case.tokens, len(case.tokens.code)
    completion = torch.arange(case.rewards.numel()).repeat(levels)
    sampled = SampledTokens(tokens.row.long(), tokens.code.flatten().long(), completion, tokens.counted.flatten())
    frozen = log_policy(case.reference, valid, log_prior, 1.0)
    expected = trie_grpo_reference(logits, valid, log_prior, sampled, case.rewards, objective, levels, frozen)
    for ours, right in zip(terms.per_token, expected.per_token, strict=True):
        assert torch.equal(ours.flatten(), right)
    for ours, right in zip(*(torch.autograd.grad(t.loss, logits) for t in (terms, expected)), strict=True):
        assert torch.equal(ours, right)


def test_implementations_name_every_part(monkeypatch: pytest.MonkeyPatch):
    parts = {"trie_grpo", "sid_cross_entropy", "prompt_attention", "completion_attention", "vocabulary_cross_entropy"}
    found = kernels.implementations("cpu")
    assert set(found) == parts and set(found.values()) == {"eager reference"}
    found = kernels.implementations("cuda", head_dim=64)
    assert set(found) == parts
    assert all(found[part].startswith("triton ") for part in kernels.PARTS)
    odd = kernels.implementations("cuda", head_dim=80)
    assert odd["trie_grpo"].startswith("triton ")
    assert odd["completion_attention"] == odd["prompt_attention"]
    assert odd["prompt_attention"] == "eager reference (heads of 80 dimensions; the kernels take 32, 64, 128)"
    assert found["vocabulary_cross_entropy"] == f"liger-kernel {version('liger-kernel')}"
    monkeypatch.setattr(dispatch, "find_spec", lambda _: None)
    assert (
        kernels.implementations("cuda")["vocabulary_cross_entropy"] == "eager reference (liger-kernel is not installed)"
    )
    with dispatch.eager():
        assert set(kernels.implementations("cuda").values()) == {"eager reference"}
