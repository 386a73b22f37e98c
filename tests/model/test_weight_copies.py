import torch
from torch import nn

from negfast.model.weight_copies import WeightCopies


def test_products_and_gradients_are_those_of_autocast():
    """Two calls of each layer in one step, and a layer that is not called; a second step sees changed weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4, bias=False), nn.Linear(3, 3))
    copies, x = WeightCopies(module), torch.randn(5, 8)
    addresses = [copy.data_ptr() for copy in copies.copies]
    names = [name for name, _ in module.named_parameters()]

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (module[:3](x).float() + module[:3](2 * x).float()).square().mean()

    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):  # what is cast for the first call serves the second
            value = loss()
            value.backward()
        wanted: dict[str, torch.Tensor | None] = {name: p.grad for name, p in module.named_parameters()}
        module.zero_grad()
        with copies.in_use():
            assert [name for name, _ in module.named_parameters()] == names
            found = loss()
        found.backward()
        assert torch.equal(found, value)
        for name, parameter in module.named_parameters():
            right = wanted[name]
            if parameter.grad is None or right is None:
                assert name.startswith("3.") and right is parameter.grad
            else:
                assert torch.equal(parameter.grad, right), name
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1)
        module.zero_grad()
    assert [copy.data_ptr() for copy in copies.copies] == addresses
    assert isinstance(module[0].weight, nn.Parameter)
