"""What a policy answers to an evaluation set: generated items, filter probabilities, pool scores."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from negfast.data.split import Requests
from negfast.evaluate.expected import expected_rewards, item_log_probs, reward_table
from negfast.evaluate.predictions import TOP, Predictions, threshold_for_share
from negfast.evaluate.sets import POOL, EvalSet, check_choosable, history_ends
from negfast.model.beam import beam_search
from negfast.model.prompts import MIXED
from negfast.sid.prior import NEXT_DISLIKE
from negfast.train.engine import Engine
from negfast.train.verdict import Candidates, group_candidates, read_candidates, verdict_logits

CANDIDATES_AT_ONCE = 512


@dataclass(frozen=True)
class Calibration:
    """Platt scaling of verdict logits, fitted on valid: P(dislike) = sigmoid(slope * logit + intercept)."""

    slope: float
    intercept: float
    threshold: float  # probability at or above which 10 % of the valid events lie

    def probability(self, logit: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.slope * logit + self.intercept)))


def generate(
    engine: Engine, requests: Requests, top: int = TOP, with_policy: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The ``top`` items that each request's user will most probably dislike: int32 [R, top] and log p float32 [R, top].

    -1 and -inf pad rows with fewer unseen items. Without the policy the community prior alone answers.
    """
    items = np.full((len(requests), top), -1, dtype=np.int32)
    scores = np.full((len(requests), top), -np.inf, dtype=np.float32)
    # requests of similar length together: attention pads a batch's prompts to its longest
    ends = history_ends(engine.log, requests.user, requests.day)
    order = np.argsort(ends - engine.log.user_offsets[requests.user], kind="stable")
    size = engine.config.eval.batch
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = engine.prompts.build(requests.user[rows], requests.day[rows], MIXED, 0, tail="next-dislike")
        found, log_p = beam_search(
            engine.policy if with_policy else None,
            engine.chooser,
            batch.layout,
            batch.tokens,
            batch.prior,
            NEXT_DISLIKE,
            max(engine.config.eval.beam, top),
            top,
        )
        items[rows], scores[rows] = found.cpu().numpy(), log_p.cpu().numpy()
    return items, scores


@torch.no_grad()
def candidate_logits(engine: Engine, candidates: Candidates, view: int = MIXED) -> np.ndarray:
    """Verdict logits float64 [E] of candidates, in batches of similar prompt length."""
    out = np.empty(len(candidates.items))
    candidates = candidates.split(CANDIDATES_AT_ONCE)
    ends = history_ends(engine.log, candidates.user, candidates.day - 1)
    order = np.argsort(ends - engine.log.user_offsets[candidates.user], kind="stable")
    counts = np.diff(candidates.offsets)[order]
    batch_of = (np.cumsum(counts) - counts) // CANDIDATES_AT_ONCE
    for batch in np.unique(batch_of):
        part, places = candidates.take(order[batch_of == batch])
        out[places] = verdict_logits(engine.policy, read_candidates(engine, part, view)).double().cpu().numpy()
    return out


def filter_logits(engine: Engine, evalset: EvalSet, view: int = MIXED) -> np.ndarray:
    """Verdict logits of the filter events, float64 [E]."""
    order = np.lexsort((evalset.filter_day, evalset.filter_user))
    candidates = group_candidates(evalset.filter_user[order], evalset.filter_day[order], evalset.filter_item[order])
    out = np.empty(len(order))
    out[order] = candidate_logits(engine, candidates, view)
    return out


def pool_logits(engine: Engine, evalset: EvalSet) -> np.ndarray:
    """Verdict logits of the matched pools, float64 [N, POOL]."""
    user, day = np.repeat(evalset.pool_user, POOL), np.repeat(evalset.pool_day + 1, POOL)
    order = np.lexsort((day, user))
    candidates = group_candidates(user[order], day[order], evalset.pool_items.reshape(-1)[order])
    out = np.empty(len(order))
    out[order] = candidate_logits(engine, candidates)
    return out.reshape(-1, POOL)


def calibrate(engine: Engine, valid: EvalSet) -> Calibration:
    """Fits the scaling and the threshold on the valid filter events; InputError where they are of one kind."""
    check_choosable(valid)
    logit = filter_logits(engine, valid)
    fit = LogisticRegression(C=1e6).fit(logit[:, None], valid.filter_dislike)
    scaling = Calibration(float(fit.coef_[0, 0]), float(fit.intercept_[0]), 0.5)
    return Calibration(scaling.slope, scaling.intercept, threshold_for_share(scaling.probability(logit)))


def predict_set(engine: Engine, evalset: EvalSet, calibration: Calibration) -> Predictions:
    """All answers of the engine's policy to ``evalset``."""
    engine.policy.eval()
    return Predictions(
        generated=generate(engine, evalset.requests)[0],
        filter_score=calibration.probability(filter_logits(engine, evalset)),
        filter_is_probability=True,
        filter_threshold=calibration.threshold,
        pool_score=pool_logits(engine, evalset),
    )


def hit_rate(requests: Requests, generated: np.ndarray) -> float:
    """The share of requests of which a future dislike is among the generated items int32 [R, K]."""
    owner = np.repeat(np.arange(len(requests)), np.diff(requests.dislike_offsets))
    hit = np.zeros(len(requests), dtype=bool)
    np.logical_or.at(hit, owner, (generated[owner] == requests.dislikes[:, None]).any(1))
    return float(hit.mean())


def future_log_probs(engine: Engine, requests: Requests) -> np.ndarray:
    """log p(item | context, next-dislike) of every item of every F, exact on the trie, float64 [len(dislikes)]."""
    return item_log_probs(engine, requests.user, requests.day, requests.dislike_offsets, requests.dislikes)


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

    def __init__(self, engine: Engine, valid: EvalSet, scales: tuple[float, ...] = (), by_reward: bool = False) -> None:
        self.engine, self.scales, self.by_reward = engine, scales, by_reward
        size = engine.config.eval.valid_requests
        rng = np.random.default_rng(engine.config.train.seed)
        rows = np.sort(rng.permutation(len(valid.requests))[:size])
        self.requests = valid.requests.take(rows)
        self.rewards = reward_table(engine, self.requests)
        events = np.sort(rng.permutation(len(valid.filter_user))[: size * 8])
        order = events[np.lexsort((valid.filter_day[events], valid.filter_user[events]))]
        self.candidates = group_candidates(valid.filter_user[order], valid.filter_day[order], valid.filter_item[order])
        self.labels = valid.filter_dislike[order]

    def __call__(self) -> dict[str, float]:
        """nll (of F, nats a request), scale, reward, FHR@20, filter_auc (where both classes are there) and score;
        leaves the chosen scale set."""
        scale = self.engine.policy.block.scale
        nlls = {}
        for value in self.scales or (float(scale),):
            scale.fill_(value)
            nlls[value] = self._nll()
        best = min(nlls, key=lambda value: (nlls[value], -value))
        scale.fill_(best)
        hits = hit_rate(self.requests, generate(self.engine, self.requests, top=20)[0])
        reward = float(expected_rewards(self.engine, self.requests, self.rewards).mean())
        metrics = {"nll": nlls[best], "scale": best, "reward": reward, "FHR@20": hits}
        if 0 < self.labels.sum() < len(self.labels):
            metrics["filter_auc"] = float(roc_auc_score(self.labels, candidate_logits(self.engine, self.candidates)))
        return {**metrics, "score": reward if self.by_reward else -nlls[best]}

    def _nll(self) -> float:
        counts = np.diff(self.requests.dislike_offsets)
        return -float((future_log_probs(self.engine, self.requests) / np.repeat(counts, counts)).sum() / len(counts))
