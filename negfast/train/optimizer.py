"""AdamW and its schedule."""

import math

import torch

from negfast.config import Stage
from negfast.model.policy import Policy


def make_optimizer(policy: Policy, config: Stage) -> torch.optim.AdamW:
    """AdamW; weight decay for the decoder's matrices only."""
    trained = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    decayed = [p for n, p in trained if p.ndim == 2 and n.startswith("decoder.layers")]
    taken = {id(p) for p in decayed}
    rest = [p for _, p in trained if id(p) not in taken]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, config: Stage) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
