"""The context schedule of progressive GRPO: negative-only prompts first, then a rising share of mixed ones, where the
likes do no harm."""

import numpy as np

from negfast.config import Grpo
from negfast.data.log import history_ends
from negfast.data.split import UserDays
from negfast.evaluate.bootstrap import interval, ratio, resample_users, weighted_sums
from negfast.model.histories import MIXED, NEGATIVE_ONLY
from negfast.runtime.engine import Engine
from negfast.train.expected import expected_rewards, reward_table

BUCKETS = (10, 50)  # events of a history where the next bucket begins
MEASURED = 512  # requests a bucket, at most
RESAMPLES = 500
TOLERANCE = 0.05  # of the negative-only reward, that the mixed view may lose


class ViewSchedule:
    """Which view each request's prompt gets at each step (negfast's choice).

    "progressive": negative-only in the first phase, then a share of mixed prompts that rises linearly to
    ``mixed_share`` at the last step; only for requests of those history sizes for which the mixed view was measured not
    to be worse. The others, for comparison: mixed from the first step on ("mixed"), or ``mixed_share`` throughout
    ("static").
    """

    def __init__(self, settings: Grpo, allow_mixed: np.ndarray) -> None:
        """``allow_mixed`` bool [R]: the requests whose prompts may be mixed."""
        self.settings, self.allow_mixed = settings, allow_mixed

    def share(self, step: int) -> float:
        """Share of mixed prompts to be expected at a step."""
        return self._rise(step) * float(self.allow_mixed.mean())

    def draw(self, step: int, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The views of the requests at ``rows`` int [B] at a step, uint8."""
        mixed = (rng.random(len(rows)) < self._rise(step)) & self.allow_mixed[rows]
        return np.where(mixed, MIXED, NEGATIVE_ONLY).astype(np.uint8)

    def _rise(self, step: int) -> float:
        settings = self.settings
        if settings.schedule == "mixed":
            return 1.0
        if settings.schedule == "static":
            return settings.mixed_share
        first = round(settings.negative_phase * settings.steps)
        if step < first:
            return 0.0
        return settings.mixed_share * (step - first + 1) / max(settings.steps - first, 1)


def history_bucket(engine: Engine, requests: UserDays) -> np.ndarray:
    """The bucket of each request's history by its number of events up to t, int64 [R] in 0..len(BUCKETS)."""
    log = engine.log
    events = history_ends(log, requests.user, requests.day) - log.user_offsets[requests.user]
    return np.searchsorted(BUCKETS, events, side="right")


def measure_views(engine: Engine, requests: UserDays) -> tuple[np.ndarray, dict[str, float]]:
    """Whether the likes in a prompt do no harm, for each history bucket: bool [len(BUCKETS) + 1], and the figures.

    Under the policy as it is, the exact expected reward of train requests on mixed prompts less that on negative-only
    ones, by a paired bootstrap over users: the 2.5 % bound must lie above -`TOLERANCE` of the negative-only reward. The
    same policy and requests give the same answer, so a resumed stage finds the schedule that it began with.
    """
    bucket = history_bucket(engine, requests)
    rng = np.random.default_rng(engine.config.train.seed)
    allow_mixed, figures = np.zeros(len(BUCKETS) + 1, dtype=bool), dict[str, float]()
    rows = np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(bucket == n))[:MEASURED] for n in range(len(allow_mixed))])
    )
    part = requests.take(rows)
    table = reward_table(engine, part)
    mixed, negative = (expected_rewards(engine, part, table, view) for view in (MIXED, NEGATIVE_ONLY))
    for number in np.unique(bucket).tolist():
        mine = bucket[rows] == number
        users, user = np.unique(part.user[mine], return_inverse=True)
        columns = np.stack([(mixed - negative)[mine], np.ones(mine.sum())], axis=1)
        sums = weighted_sums(resample_users(len(users), RESAMPLES, engine.config.train.seed), user, columns)
        found, earned = interval(ratio(sums[:, 0], sums[:, 1])), float(negative[mine].mean())
        assert found["mean"] is not None and found["low"] is not None
        allow_mixed[number] = found["low"] > -TOLERANCE * earned
        figures |= {
            f"mixed_gain_{number}": found["mean"],
            f"mixed_gain_low_{number}": found["low"],
            f"negative_reward_{number}": earned,
        }
    return allow_mixed, figures
