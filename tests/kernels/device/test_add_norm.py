"""The addition and RMSNorm in one kernel against the reference in float64."""

import pytest
import torch

from negfast.kernels.add_norm import add_norm
from negfast.kernels.add_norm_reference import add_norm_reference
from tests.kernels.cases import relative_error

FLOAT, HALF = torch.float32, torch.bfloat16
EPS = 1e-6


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program of the backward has several rows."""
    monkeypatch.setattr("negfast.kernels.add_norm.processors", lambda _: 1)


def outputs(call, inputs, dtype, uses_sum=True):
    """Sum, normed and every gradient, of a loss that reads both or normed alone."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    total, normed = call(*inputs, EPS, dtype)
    weight = torch.linspace(-1, 1, normed.numel(), device=normed.device, dtype=torch.float64).view(normed.shape)
    loss = (normed.double() * weight).sum() + (total.double() * weight.flip(0)).sum() * uses_sum
    known = [x for x in inputs if x is not None]
    return [total, normed, *torch.autograd.grad(loss, known)]


@pytest.mark.parametrize("shape", [(1, 5), (5, 33), (1, 7, 128), (45, 96)], ids=str)
@pytest.mark.parametrize("types", [(FLOAT, FLOAT, FLOAT), (FLOAT, HALF, HALF), (HALF, HALF, HALF)], ids=str)
@pytest.mark.parametrize("uses_sum", [True, False], ids=["sum", "normed-alone"])
def test_of_any_shape(shape, types, uses_sum, device: torch.device, seed: int):
    """No further from float64 than eager code; rows and columns that fill no block."""
    torch.manual_seed(seed)
    stream, branch = (torch.randn(shape, device=device).to(kind) for kind in types[:2])
    weight = 1 + 0.2 * torch.randn(shape[-1], device=device)
    inputs = stream, branch, weight
    found, eager = (outputs(call, inputs, types[2], uses_sum) for call in (add_norm, add_norm_reference))
    exact = outputs(add_norm_reference, [x.double() for x in inputs], torch.float64, uses_sum)
    for name, ours, other, right in zip(("sum", "normed", "dx", "db", "dw"), found, eager, exact, strict=True):
        assert relative_error(ours, right) <= 1.2 * relative_error(other, right) + 1e-6, name
    assert [x.dtype for x in found] == [types[0], types[2], types[0], types[1], FLOAT]


def test_without_an_addition(device: torch.device, seed: int):
    torch.manual_seed(seed)
    stream, weight = torch.randn(9, 40, device=device), 1 + torch.randn(40, device=device)
    found = outputs(add_norm, (stream, None, weight), FLOAT)
    exact = outputs(add_norm_reference, (stream.double(), None, weight.double()), torch.float64)
    for ours, right in zip(found, exact, strict=True):
        assert relative_error(ours, right) <= 2e-6
    assert torch.equal(found[0], stream)


def test_no_rows(device: torch.device):
    stream, weight = torch.zeros(0, 8, device=device, requires_grad=True), torch.ones(8, device=device)
    total, normed = add_norm(stream, stream.detach().to(HALF), weight, EPS, HALF)
    (total.sum() + normed.float().sum()).backward()
    assert stream.grad is not None and total.shape == normed.shape == stream.grad.shape == (0, 8)


def test_runs_are_bit_equal(device: torch.device, seed: int):
    torch.manual_seed(seed)
    inputs = torch.randn(70, 64, device=device), torch.randn(70, 64, device=device), torch.randn(64, device=device)
    for first, second in zip(*(outputs(add_norm, inputs, FLOAT) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_other_shapes_are_refused(device: torch.device):
    stream = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match=r"branch: found shape \(3, 8\), expected \(2, 8\)"):
        add_norm(stream, torch.zeros(3, 8, device=device), torch.ones(8, device=device), EPS, FLOAT)
    with pytest.raises(ValueError, match=r"weight: found shape \(4,\), expected \(8,\)"):
        add_norm(stream, None, torch.ones(4, device=device), EPS, FLOAT)
