"""Where the time of a step goes: the calls between its phases, timed."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch import Tensor

from bench.grpo_step import Ours
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.train.grpo import loss as grpo


def breakdown(ours: Ours, steps: int = 5) -> dict[str, float]:
    """Seconds a step by phase, means over ``steps``.

    "head and loss": logits, the trie's log-probabilities and the objective. "host": layout, pruning, prior, noise and
    sampling. The reference's row holds its forward and its head.
    """
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - began

    hidden, code_logits, rollout = Policy.hidden, Policy.code_logits, grpo.rollout

    def timed_hidden(policy: Policy, layout: GroupLayout, prompt: Tensor | None, *rest: Any, **options: Any) -> Tensor:
        phase = "reference" if policy is ours.reference else "levels" if prompt is None else "prompt"
        return timed(phase, hidden, policy, layout, prompt, *rest, **options)

    def timed_head(policy: Policy, *arguments: Any) -> Tensor:
        return timed("reference" if policy is ours.reference else "head", code_logits, policy, *arguments)

    def timed_rollout(*arguments: Any, **options: Any) -> grpo.Rollout:
        return timed("rollout", rollout, *arguments, **options)

    with (
        patch.object(Policy, "hidden", timed_hidden),
        patch.object(Policy, "code_logits", timed_head),
        patch.object(grpo, "rollout", timed_rollout),
    ):
        for _ in range(steps):
            began = time.perf_counter()
            batch = timed("batch", ours.batch)
            with patch.object(ours, "batch", lambda batch=batch: batch):
                result = timed("before backward", ours.loss).terms
            timed("backward", result.loss.backward)
            timed("optimiser", ours.update)
            seconds["total"] += time.perf_counter() - began
    each = defaultdict(float, {name: value / steps for name, value in seconds.items()})
    sampling = each["rollout"] - each["prompt"] - each["levels"] - each["head"]
    return {
        "prompt": each["prompt"],
        "levels": each["levels"],
        "reference": each["reference"],
        "head and loss": each["head"] + each["before backward"] - each["rollout"] - each["reference"],
        "backward": each["backward"],
        "optimiser": each["optimiser"],
        "host": each["batch"] + sampling,
        "total": each["total"],
    }
