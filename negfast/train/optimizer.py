"""AdamW and its schedule."""

import math

import torch
from torch import nn

from negfast.config import Stage, Train
from negfast.model.policy import Policy
from negfast.runtime.sharding import is_sharded


def make_optimizer(policy: Policy, config: Stage, train: Train) -> torch.optim.AdamW:
    """AdamW; weight decay for the decoder's matrices only."""
    trained = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    decayed = [p for n, p in trained if p.ndim == 2 and n.startswith("decoder.layers")]
    taken = {id(p) for p in decayed}
    rest = [p for _, p in trained if id(p) not in taken]
    groups = [
        {"params": part, "weight_decay": decay}
        for params, decay in ((decayed, train.weight_decay), (rest, 0.0))
        for part in _alike(params)
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def _alike(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The sharded ones apart from the others, since one fused update takes one kind only."""
    parts = [[p for p in params if is_sharded(p) == kind] for kind in (True, False)]
    return [part for part in parts if part]


def learning_rate(step: int, config: Stage) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
