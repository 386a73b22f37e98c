"""The look at valid during training, by which the weights that are kept are chosen."""

from collections.abc import Sequence

import numpy as np

from negfast.data.split import Requests
from negfast.evaluate.sets import ChoosingSet
from negfast.runtime.engine import Engine
from negfast.runtime.generation import generate
from negfast.train.expected import expected_rewards, item_log_probs, reward_table


def hit_rate(requests: Requests, generated: np.ndarray) -> float:
    """The share of requests of which a future dislike is among the generated items int32 [R, K]."""
    owner = np.repeat(np.arange(len(requests)), np.diff(requests.dislike_offsets))
    hit = np.zeros(len(requests), dtype=bool)
    np.logical_or.at(hit, owner, (generated[owner] == requests.dislikes[:, None]).any(1))
    return float(hit.mean())


def future_nlls(engine: Engine, requests: Requests, scales: Sequence[float]) -> list[float]:
    """The mean negative log-likelihood of F, nats a request, under each scale of the code logits."""
    offsets, counts = requests.dislike_offsets, np.diff(requests.dislike_offsets)
    log_p = item_log_probs(engine, requests.user, requests.day, offsets, requests.dislikes, scales=scales)
    return (-(log_p / np.repeat(counts, counts)).sum(1) / len(counts)).tolist()


class Validation:
    """The quick look at valid during training, on a fixed sample; its score chooses the weights that are kept.

    The score is the likelihood of the future dislikes or, with ``by_reward``, the expected reward: what SFT and GRPO
    maximise. Both are exact, and a sample tells them far more surely than hits among twenty items. Valid is asked about
    the window, also where training has the next item for its target.

    With ``scales`` it also chooses how far to trust what was learned of items, as the policy's scale of code logits
    against the community prior: what people dislike drifts, and what a model learned of items over the train days
    ages with it, while the prior, counted up to t, does not (negfast's choice). The scale is the one under which the
    future dislikes are likeliest.
    """

    def __init__(
        self, engine: Engine, valid: ChoosingSet, scales: tuple[float, ...] = (), by_reward: bool = False
    ) -> None:
        self.engine, self.scales, self.by_reward = engine, scales, by_reward
        size = engine.config.eval.valid_requests
        rng = np.random.default_rng(engine.config.train.seed)
        rows = np.sort(rng.permutation(len(valid.asked))[:size])
        self.requests = valid.asked.take(rows)
        self.rewards = reward_table(engine, self.requests)

    def __call__(self) -> dict[str, float]:
        """nll (of F, nats a request), scale, reward, FHR@20 and score; leaves the chosen scale set."""
        scale = self.engine.policy.block.scale
        scales = self.scales or (float(scale),)
        nlls = dict(zip(scales, future_nlls(self.engine, self.requests, scales), strict=True))
        best = min(nlls, key=lambda value: (nlls[value], -value))
        scale.fill_(best)
        hits = hit_rate(self.requests, generate(self.engine, self.requests, top=20)[0])
        reward = float(expected_rewards(self.engine, self.requests, self.rewards).mean())
        metrics = {"nll": nlls[best], "scale": best, "reward": reward, "FHR@20": hits}
        return {**metrics, "score": reward if self.by_reward else -nlls[best]}
