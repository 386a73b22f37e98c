"""How far to trust what SFT learned of items: the scale of code logits against the community prior, chosen on valid.

What people will dislike next drifts, and what a model learns of items over the train days ages with it; the prior,
counted up to t, does not. Shrinking the learned part is the plain remedy (negfast's choice). The smallest scale is
close to the prior alone, yet leaves GRPO a gradient.
"""

from negfast.data.split import Requests
from negfast.evaluate.model import generate, hit_rate
from negfast.train.engine import Engine

SCALES = (0.1, 0.25, 0.5, 0.75, 1.0)


def shrink(engine: Engine, requests: Requests) -> dict[str, float]:
    """Sets the policy's scale to the one with the best FHR@20 on ``requests``, the largest of equals.

    Returns FHR@20 by scale and the scale chosen.
    """
    scale = engine.policy.block.scale
    found = {}
    for value in SCALES:
        scale.fill_(value)
        found[value] = hit_rate(requests, generate(engine, requests, top=20)[0])
    best = max(SCALES, key=lambda value: (found[value], value))
    scale.fill_(best)
    return {f"FHR@20 at {value}": rate for value, rate in found.items()} | {"scale": best}
