"""What one GRPO step asks of the device, counted: 28 layers, 4 levels, beta above 0, bfloat16, liger-kernel's layers.

Measured figures may fall; a step that needs more has to say why.
"""

from torch import nn

from bench.grpo_step import Case, Ours
from negfast.config import Model
from negfast.model.policy import Policy
from tests.device.fake_cuda import CUDA, Trace

SHAPE = Model(hidden=64, intermediate=96, layers=28, heads=4, kv_heads=2, head_dim=32)
CASE = Case(lengths=(100, 80, 60, 100), group=16, levels=4)
FORWARD, BACKWARD = 1534, 1025  # launches; 3,500 together were the aim
EAGER = 4000  # forward, where no graph can be captured


def copies(trace: Trace, policy: Policy) -> float:
    """How often a step cast the decoder's matrices to bfloat16."""
    weights = [module.weight for module in policy.decoder.modules() if isinstance(module, nn.Linear)]
    return sum(trace.casts[id(weight)] for weight in weights) / sum(weight.numel() for weight in weights)


def step(ours: Ours, trace: Trace) -> tuple[int, int]:
    """Launches of a step, forward and backward."""
    trace.reset()
    with ours.policy.weights_cast_once():
        loss = ours.loss().terms.loss
        forward = trace.launches.total()
        loss.backward()
    backward = trace.launches.total() - forward
    ours.update()
    print(f"{forward} launches forward, {backward} backward")
    return forward, backward


def test_grpo_step(trace):
    ours = Ours(CASE, SHAPE, CUDA)
    ours.step()  # makes the tables that later steps share, and captures the graphs
    captured = trace.captured.total()
    forward, backward = step(ours, trace)
    assert forward <= FORWARD and backward <= BACKWARD
    assert trace.launches["graph"] == CASE.levels + 1  # the marker, three levels and the reference policy
    assert captured > 2000 and not trace.captured  # which eager code would launch at each step
    assert copies(trace, ours.policy) == 1 and copies(trace, ours.reference) == 0
    assert not trace.waits and not trace.unordered


def test_grpo_step_without_graphs(trace):
    """Where capturing failed."""
    ours = Ours(CASE, SHAPE, CUDA)
    ours.group_loss.graphs.failed = True
    ours.step()
    forward, backward = step(ours, trace)
    assert forward <= EAGER and backward <= BACKWARD
    assert copies(trace, ours.policy) == 1 and not trace.waits
