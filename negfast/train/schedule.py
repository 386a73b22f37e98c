"""The context schedule of progressive GRPO: negative-only prompts first, then a rising share of mixed ones."""

import numpy as np

from negfast.config import Grpo
from negfast.model.prompts import MIXED, NEGATIVE_ONLY


def mixed_share(step: int, settings: Grpo) -> float:
    """Share of mixed prompts at a step.

    Progressive: 0 in the first phase, then linear to ``mixed_share`` at the last step. For comparison: 1 from the
    first step on ("mixed"), or ``mixed_share`` throughout ("static").
    """
    if settings.schedule == "mixed":
        return 1.0
    if settings.schedule == "static":
        return settings.mixed_share
    first = round(settings.negative_phase * settings.steps)
    if step < first:
        return 0.0
    return settings.mixed_share * (step - first + 1) / max(settings.steps - first, 1)


def schedule_views(step: int, size: int, settings: Grpo, rng: np.random.Generator) -> np.ndarray:
    """The view of each of ``size`` requests of a step, uint8."""
    return np.where(rng.random(size) < mixed_share(step, settings), MIXED, NEGATIVE_ONLY).astype(np.uint8)
