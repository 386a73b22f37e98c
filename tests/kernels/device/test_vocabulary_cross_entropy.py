"""The loss over a whole vocabulary by liger-kernel against float64, and the two that are made of it against eager code.

liger-kernel comes with the development extra; without it these tests fail.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from negfast import kernels
from negfast.kernels import dispatch
from negfast.kernels import vocabulary_cross_entropy as module
from negfast.kernels.vocabulary_cross_entropy import row_entropy, vocabulary_cross_entropy
from negfast.train.text import text_nll
from tests.kernels.cases import relative_error

ROUNDING = 3e-6


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Logits, of which some rows are nearly certain of their targets; targets; what flows back to the rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, width, generator=generator)
    target = torch.randint(width, (rows,), generator=generator)
    logits[torch.arange(0, rows, 3), target[::3]] += 15
    return logits.to(device, dtype), target.to(device), torch.randn(rows, generator=generator).to(device)


def gradient(logits: torch.Tensor, target: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    nll = vocabulary_cross_entropy(1 * leaf, target)  # a copy, since logits are given up
    return nll.detach(), torch.autograd.grad(nll, leaf, grad.to(nll.dtype))[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the logits that Liger is given."""
    loss, shapes = dispatch.liger_cross_entropy(), []

    def counting(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(logits.shape))
        return loss(logits, target)

    monkeypatch.setattr(module, "liger_cross_entropy", lambda: counting)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (123, 2), (7, 507), (5, 32768), (4, 70001)])
def test_loss_and_gradient(rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int, calls: list):
    """Up to rows that Liger reads in three blocks."""
    given = inputs(rows, width, dtype, device, seed)
    found = gradient(*given)
    assert calls == [(rows, width)]
    with dispatch.eager():
        plain, truth = gradient(*given), gradient(given[0].double(), *given[1:])
    for name, ours, eager, right in zip(("nll", "dlogits"), found, plain, truth, strict=True):
        assert ours.shape == eager.shape and ours.dtype == eager.dtype, name
        error, allowed = relative_error(ours, right, scale=1e-3), relative_error(eager, right, scale=1e-3)
        assert error <= 1.1 * allowed + ROUNDING, f"{name}: {error:.2e}, eager {allowed:.2e}"


def test_without_a_gradient_logits_stay_as_they_are(device: torch.device, seed: int):
    logits, target, _ = inputs(9, 100, torch.float32, device, seed)
    before = logits.clone()
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(vocabulary_cross_entropy(logits, target), expected)
    assert torch.equal(logits, before)


def test_entropy(device: torch.device, seed: int):
    """More rows than are taken at once."""
    logits, *_ = inputs(module.ROWS_AT_ONCE + 3, 50, torch.float64, device, seed)
    torch.testing.assert_close(row_entropy(logits), torch.distributions.Categorical(logits=logits).entropy())


def test_text_loss(device: torch.device, seed: int, calls: list):
    """What an alignment task learns of its words: the loss, and the gradients of head and states."""
    torch.manual_seed(seed)
    policy: Any = SimpleNamespace(text_head=torch.nn.Linear(24, 3001, bias=False, device=device))
    states = torch.randn(37, 24, device=device, requires_grad=True)
    targets = torch.randint(3001, (37,), device=device)
    leaves = states, policy.text_head.weight

    def step() -> tuple[torch.Tensor, ...]:
        loss = text_nll(policy, states, targets)
        return loss.detach(), *torch.autograd.grad(loss / 37, leaves)

    found = step()
    assert calls == [(37, 3001)]
    with dispatch.eager():
        expected = step()
    assert len(calls) == 1
    for ours, right in zip(found, expected, strict=True):
        assert relative_error(ours, right) < 1e-5


def test_what_is_unsupported_raises(device: torch.device, seed: int):
    logits, target, _ = inputs(4, 10, torch.float32, device, seed)
    for message, arguments in {
        "found torch.float64, expected float32": (logits.double(), target),
        r"torch\.int32 \(4,\), expected": (logits, target.int()),
        r"\(4, 10\) and torch\.int64 \(3,\)": (logits, target[1:]),
    }.items():
        with pytest.raises(ValueError, match=message):
            vocabulary_cross_entropy(*arguments)


def test_training_says_so(device: torch.device):
    assert kernels.implementations(device)["vocabulary_cross_entropy"].startswith("liger-kernel 0.")
    with dispatch.eager():
        assert kernels.implementations(device)["vocabulary_cross_entropy"] == "eager reference"
