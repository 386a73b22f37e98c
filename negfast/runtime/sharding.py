"""Weights sharded over ranks by PyTorch's FSDP2: of a decoder layer each rank keeps a part of its weights, gradients
and moments, and the whole only while a step computes.

The group pass calls every layer once for the prompts and once for each further level. Gathering at every call would
cost as many gathers, and as many again on the way back, so layers are gathered once a step, from the first call to the
end of the last backward (`gathered`); their gradients are reduced layer by layer on the way. Embeddings, heads and the
code block stay whole on every rank, as in `distributed`. docs/scaling.md has the calculation.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from negfast.config import Config
from negfast.errors import InputError
from negfast.model.policy import Policy
from negfast.runtime import distributed

if TYPE_CHECKING:  # a second of imports, for those who shard
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

TRAINED_BYTES, FROZEN_BYTES = 20, 4  # a weight: itself, gradient, two moments and GRPO's reference, float32 each
ROOM = 0.6  # of a GPU's memory that they may take before `auto` shards


def wanted(setting: str, state: int, memory: int | None) -> bool:
    """Whether `train.shard` asks for it with ``state`` bytes on ranks with ``memory`` bytes (None: no GPU). Never on a
    single rank."""
    if distributed.size() == 1:
        return False
    return setting == "fsdp" or (setting == "auto" and memory is not None and state > ROOM * memory)


def shard(policy: Policy, config: Config, device: torch.device) -> bool:
    """Shards the decoder's layers where the settings want it; says whether it did. All ranks hold the same weights.

    InputError where ranks could call GRPO's reference, which is gathered for each call, differently often.
    """
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    state = sum(p.numel() * (TRAINED_BYTES if p.requires_grad else FROZEN_BYTES) for p in policy.parameters())
    if not wanted(config.train.shard, state, memory):
        return False
    if config.train.token_budget and config.grpo.beta and config.grpo.steps:
        found = f"train.token_budget: found {config.train.token_budget} with sharded weights and grpo.beta"
        raise InputError(f"{found}, expected 0: ranks must have equally many parts, as train.accumulate gives them")
    layers = policy.decoder.layers
    bare = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in layers.parameters()}
    policy.bare_layers = (copy.deepcopy(layers, bare),)  # in a tuple: no part of the module
    _shard_layers(policy, device, keep_gathered=True)
    return True


def _shard_layers(policy: Policy, device: torch.device, keep_gathered: bool) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, share_comm_ctx

    mesh = init_device_mesh(device.type, (distributed.size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if policy.in_bfloat16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does, where it should
    )
    layers = list(policy.decoder.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=not keep_gathered, mp_policy=precision)
        layer.set_reshard_after_backward(not keep_gathered)
        layer.set_gradient_divide_factor(1.0)  # losses are sums over the whole batch already
        layer.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    share_comm_ctx(layers)


def sharded_layers(policy: nn.Module) -> list["FSDPModule"]:
    """The layers that are sharded; none where nothing is."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """All weights on every rank within the block, which all ranks enter; then a single one may compute forwards too.

    TrainingError where another rank is gone.
    """
    layers = sharded_layers(policy)
    try:
        gathering = [layer.unshard(async_op=True) for layer in layers]  # a layer's first call waits for it
        yield
        for layer, gather in zip(layers, gathering, strict=True):
            if gather is not None:
                gather.wait()  # where this rank made no call
            layer.reshard()
    except RuntimeError as error:
        if layers and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise distributed.gone(error) from error
        raise


def reduce_gradients(policy: nn.Module, now: bool) -> None:
    """Whether the next backward adds the layers' gradients up over ranks, or keeps them for a later one. All ranks must
    do so at the same one; how many they make before it may differ."""
    for layer in sharded_layers(policy):
        layer.set_requires_gradient_sync(now)


def frozen_copy(policy: Policy) -> Policy:
    """A copy of a sharded policy that takes no gradient, sharded alike; its layers are gathered for each call."""
    for layer in sharded_layers(policy):
        layer.reshard()  # else its parameters would be the whole ones
    [bare] = policy.bare_layers
    layers = copy.deepcopy(bare)
    twin = copy.deepcopy(policy, {id(policy.decoder.layers): layers, id(policy.bare_layers): ()})
    twin.eval().requires_grad_(False)
    device = policy.block.rows.device
    _shard_layers(twin, device, keep_gathered=False)
    layers.to_empty(device=device)
    with torch.no_grad():
        for mine, theirs in zip(layers.parameters(), policy.decoder.layers.parameters(), strict=True):
            local(mine).copy_(local(theirs))
    return twin


def is_sharded(tensor: Tensor | None) -> TypeGuard["DTensor"]:
    dtensor = sys.modules.get("torch.distributed.tensor")  # not imported: nothing can be sharded
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor from the parts of all ranks, which all ask for it; any other as it is."""
    if not is_sharded(tensor):
        return tensor
    with distributed.peers():
        return tensor.full_tensor()


def like(full: Tensor, target: Tensor) -> Tensor:
    """``full``, which every rank has, sharded and placed as ``target`` is."""
    full = full.to(target.device)
    if not is_sharded(target) or full.shape != target.shape:  # a moment is sharded, a count of steps is not
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of gradients of which some may be sharded."""
    parts = [torch.nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])]
    if split := [local(g) for g in gradients if is_sharded(g)]:
        parts.append(distributed.add(torch.nn.utils.get_total_norm(split) ** 2).sqrt())
        return torch.nn.utils.get_total_norm(parts)
    return parts[0]


def clip(parameters: list[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scales gradients so that their ``norm`` is at most ``most``."""
    split = [p.grad for p in parameters if is_sharded(p.grad)]
    torch.nn.utils.clip_grads_with_norm_([p for p in parameters if not is_sharded(p.grad)], most, norm)
    for gradient in split:
        local(gradient).mul_((most / (norm + 1e-6)).clamp(max=1.0))
