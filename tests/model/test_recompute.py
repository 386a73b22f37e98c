from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from negfast.kernels.trie_grpo import GRPOObjective
from negfast.model.recompute import recompute_layers
from negfast.train.grpo.loss import GroupLoss
from tests.train.small import Small, make_small


def gradients(small: Small, loss: Tensor) -> list[Tensor | None]:
    trained = [parameter for parameter in small.policy.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, trained, allow_unused=True))


def two_calls(small: Small) -> Tensor:
    """Prompts with branches, then further branches over their keys."""
    histories = small.histories()
    first = histories.start(small.policy, "next-dislike")
    return first.square().sum() + histories.start(small.policy, "next-like").square().sum()


def note(sizes: list[int], saved: Tensor) -> Tensor:
    sizes.append(saved.nbytes)
    return saved


def group_loss(static: bool):
    def loss(small: Small) -> Tensor:
        """Level by level over one history, or, with static shapes, by one pass."""
        rewards = torch.arange(18, dtype=torch.float64).view(3, 6, 1) % 5
        of = GroupLoss(small.policy, None, small.chooser, GRPOObjective(beta=0.0), 6, 0, static=static)
        return of.sample(small.histories(), torch.arange(3), lambda _: rewards, 0).terms.loss

    return loss


@pytest.mark.parametrize("call", [two_calls, group_loss(False), group_loss(True)], ids=["two-calls", "levels", "pass"])
def test_gradients_are_equal_and_less_is_kept(call):
    small = make_small(4)
    found, kept = [], []
    for recompute in (False, True):
        if recompute:
            recompute_layers(small.policy)
        sizes: list[int] = []
        with saved_tensors_hooks(partial(note, sizes), lambda x: x):
            loss = call(small)
        kept.append(sum(sizes))
        found.append((loss, gradients(small, loss)))
    (value, wanted), (other, got) = found
    assert torch.equal(value, other)
    assert sum(x is not None for x in wanted) > 10
    for a, b in zip(wanted, got, strict=True):
        assert (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
    assert kept[1] < 0.6 * kept[0], kept
