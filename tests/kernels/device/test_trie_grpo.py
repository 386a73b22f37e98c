"""The fused trie GRPO kernel against float64: never further off than eager code in the same dtype, plus a rounding."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from negfast.kernels import dispatch
from negfast.kernels.trie_grpo import GRPOObjective, trie_grpo
from negfast.kernels.trie_rows import RowTokens, TrieRows, TrieTables, row_inputs
from tests.kernels.cases import LossAndGradient, TrieCase, loss_and_gradient, relative_error, trie_case

ROUNDING = 3e-6
BASE = GRPOObjective(beta=0.1)


def inputs(case: TrieCase) -> tuple[torch.Tensor, TrieTables, TrieRows, RowTokens, torch.Tensor]:
    return case.logits, case.tables, case.rows, case.tokens, case.rewards


def poisoned(case: TrieCase, objective: GRPOObjective, old: torch.Tensor | None = None) -> LossAndGradient:
    """The kernel over outputs filled with NaN before it runs."""
    torch.use_deterministic_algorithms(True)  # makes torch.empty fill with NaN
    try:
        assert torch.empty(3).isnan().all()
        return loss_and_gradient(case, objective, old_log_prob=old)
    finally:
        torch.use_deterministic_algorithms(False)


def check(case: TrieCase, objective: GRPOObjective, off_policy: bool = False) -> LossAndGradient:
    exact, old, exact_old = case.to(torch.float64), None, None
    with dispatch.eager():
        if off_policy:  # far enough from the policy that ratios clip on both sides
            sampled = loss_and_gradient(exact, replace(objective, beta=0.0)).log_prob
            old = (sampled + 0.4 * torch.randn(sampled.shape, dtype=torch.float64).to(sampled.device)).float()
            exact_old = old.double()
        truth = loss_and_gradient(exact, objective, old_log_prob=exact_old)
        expected = loss_and_gradient(case, objective, old_log_prob=old)
    found = poisoned(case, objective, old)
    for name, kernel, plain, right in zip(truth._fields, found, expected, truth, strict=True):
        assert kernel.shape == plain.shape and kernel.dtype == plain.dtype, name
        scale = 0.05 if name in ("loss", "entropy") else 0.0  # terms cancel: on-policy, and where a row is certain
        error, allowed = relative_error(kernel, right, scale), relative_error(plain, right, scale)
        assert error <= 1.1 * allowed + ROUNDING, f"{name}: {error:.2e}, eager {allowed:.2e}"
    return truth


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(252, torch.float32), (507, torch.bfloat16), (123, torch.float16)],
    ids=["252-fp32", "507-bf16", "123-fp16"],
)
def test_odd_numbers_of_rows(rows: int, dtype: torch.dtype, device: torch.device, seed: int):
    case = trie_case(seed, device, prompts=3, group=13, codebook=40, items=300, rows=rows, merge=False, dtype=dtype)
    check(case, BASE, off_policy=True)


@pytest.mark.parametrize("codebook", [1, 2, 31, 33, 255, 256, 1000, 8192])
def test_codebooks(codebook: int, device: torch.device, seed: int):
    items = min(codebook**3, 400)
    check(trie_case(seed, device, prompts=2, group=3, codebook=codebook, items=items), BASE, off_policy=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_wide_rows(dtype: torch.dtype, device: torch.device, seed: int):
    case = trie_case(seed, device, prompts=2, group=5, codebook=2048, items=300, dtype=dtype)
    check(case, BASE, off_policy=True)


@pytest.mark.parametrize(
    "objective",
    [
        BASE,
        GRPOObjective(beta=0.1, scale_rewards=True, loss="grpo"),
        GRPOObjective(beta=0.1, set_size=1, kl="k3"),
        GRPOObjective(beta=0.1, set_size=3, loss="dapo"),
    ],
    ids=["plain", "scaled", "leave-one-out", "max@3"],
)
@pytest.mark.parametrize("group", [1, 3, 64])
def test_groups(group: int, objective: GRPOObjective, device: torch.device, seed: int):
    objective = replace(objective, set_size=min(objective.set_size, group))
    check(trie_case(seed, device, prompts=2, group=group, codebook=8), objective)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl", ["exact", "k3"])
def test_objectives(loss: str, kl: str, device: torch.device, seed: int):
    objective = GRPOObjective(loss=loss, kl=kl, beta=0.3, clip_low=0.1, clip_high=0.25, temperature=0.7)
    truth = check(trie_case(seed, device, group=9), objective, off_policy=True)
    assert truth.clipped.sum() > 0, "no token was clipped: the case tests nothing of clipping"


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_references(beta: float, device: torch.device, seed: int):
    check(trie_case(seed, device), replace(BASE, beta=beta))


def test_without_a_prior(device: torch.device, seed: int):
    check(trie_case(seed, device, with_prior=False), BASE, off_policy=True)


def test_equal_rewards_push_nothing(device: torch.device, seed: int):
    case = trie_case(seed, device, equal_rewards=True)
    check(case, replace(BASE, scale_rewards=True))
    assert (loss_and_gradient(case, replace(BASE, beta=0.0)).dlogits == 0).all()


def test_single_children_count_nowhere(device: torch.device, seed: int):
    """Four deep levels of few items: most nodes have one child."""
    case = trie_case(seed, device, levels=4, codebook=64, items=40, prompts=2)
    counted = case.tokens.counted
    assert (~counted).float().mean() > 0.3
    check(case, BASE, off_policy=True)
    found = loss_and_gradient(case, BASE)
    for term in (found.log_prob, found.kl, found.entropy):
        assert (term[~counted] == 0).all()


def test_uncounted_tokens_may_lie_at_any_row(device: torch.device, seed: int):
    """As those of completions that a rollout carries no further: at row 0, beside counted ones of another group."""
    case = trie_case(seed, device, levels=4, codebook=64, items=40, prompts=2)
    code, counted = case.tokens.code, case.tokens.counted
    row = torch.where(counted, case.tokens.row.view_as(code), 0)
    check(replace(case, tokens=RowTokens.build(row, code, counted, len(case.logits))), BASE, off_policy=True)


def test_pruned_and_padding_rows_get_no_gradient(device: torch.device, seed: int):
    case = trie_case(seed, device, rows=40, seen_items=30)
    check(case, BASE)
    dlogits = poisoned(case, BASE).dlogits
    valid = torch.zeros(dlogits.shape, dtype=torch.bool)
    for row, (request, prefix) in enumerate(case.row_prefix):
        valid[row, list(case.trie.choices(prefix, case.request_seen[request]))] = True
    assert (dlogits.cpu()[~valid] == 0).all()
    assert (dlogits.cpu()[valid] != 0).any()


def test_runs_are_bit_equal(device: torch.device, seed: int):
    case = trie_case(seed, device, group=8, dtype=torch.bfloat16)
    first, again = loss_and_gradient(case, BASE), loss_and_gradient(case, BASE)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_gradient_arrives_at_the_logits(device: torch.device, seed: int):
    case = trie_case(seed, device)
    logits = case.logits.clone().requires_grad_()
    terms = trie_grpo(logits, *inputs(case)[1:], BASE, reference=case.reference)
    (3 * terms.loss).backward()
    torch.testing.assert_close(logits.grad, 3 * loss_and_gradient(case, BASE).dlogits)


def test_operator_is_registered_for_compilation(device: torch.device, seed: int):
    case = trie_case(seed, device)
    rows = row_inputs(case.logits, case.tables, case.rows)
    tokens = [getattr(case.tokens, name) for name in ("start", "token", "completion", "code", "counted")]
    given = (rows, case.tables.weight, tokens, case.rewards, case.reference, None, json.dumps(asdict(BASE)))
    torch.library.opcheck(
        torch.ops.negfast.trie_grpo.default, (case.logits, *given), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_raise(bad: float, device: torch.device, seed: int):
    case = trie_case(seed, device)
    case.rewards[1, 2] = bad
    with pytest.raises(ValueError, match="rewards: found NaN or inf"):
        trie_grpo(*inputs(case), BASE, reference=case.reference)


def test_what_is_unsupported_raises(device: torch.device, seed: int):
    case = trie_case(seed, device)
    calls: dict[str, dict[str, Any]] = {
        "beta > 0": {"objective": BASE},
        "set_size: found 5": {"objective": replace(BASE, set_size=5), "reference": case.reference},
        "reference: found torch.bfloat16": {"objective": BASE, "reference": case.reference.bfloat16()},
        "reference: found shape": {"objective": BASE, "reference": case.reference[1:]},
    }
    for message, options in calls.items():
        with pytest.raises(ValueError, match=message):
            trie_grpo(*inputs(case), **options)
    with pytest.raises(ValueError, match=r"logits: found torch\.float64"):
        trie_grpo(*inputs(case.to(torch.float64)), replace(BASE, beta=0.0))
    with pytest.raises(ValueError, match=r"tokens\.code: found torch\.int64"):
        wrong = replace(case.tokens, code=case.tokens.code.long())
        trie_grpo(*inputs(replace(case, tokens=wrong)), replace(BASE, beta=0.0))
    bits = torch.zeros(len(case.tables.child_bits), 257, dtype=torch.int32, device=device)
    logits = torch.zeros(len(case.logits), 8193, device=device)
    wide = replace(case, logits=logits, tables=replace(case.tables, child_bits=bits))
    with pytest.raises(ValueError, match="codebook: found 8193"):
        trie_grpo(*inputs(wide), replace(BASE, beta=0.0))
