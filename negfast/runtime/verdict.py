"""The verdict task: will this user dislike this item, if it is consumed? Context strictly before the moment."""

from dataclasses import dataclass

import numpy as np
import torch

from negfast.data.log import DISLIKE, WITHDRAWN, EventLog
from negfast.data.split import first_feedback, sample_pairs
from negfast.model.verdict import Verdict, fit
from negfast.runtime.engine import Engine
from negfast.staging import put

EXAMPLES = 200_000  # that the verdict is fitted to, at most (negfast's choice)
MEASURED_AT_MOST = 100_000  # candidates that a calibration is made of (negfast's choice)
WARM_UP_DAYS = 30  # of the log are left out: rates mean little before (negfast's choice)


@dataclass(frozen=True)
class Candidates:
    """E items, each asked of a user at a moment."""

    user: np.ndarray  # int32 [E]
    item: np.ndarray  # int32 [E]
    moment: np.ndarray  # int64 [E], seconds; in context "day" the start of a day

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Candidates":
        return Candidates(self.user[rows], self.item[rows], self.moment[rows])


def first_feedback_candidates(
    log: EventLog, context: str, from_day: int, before_day: int
) -> tuple[Candidates, np.ndarray]:
    """The first like or dislike of every user-item pair on days [from_day, before_day), and whether each is a
    dislike, float32 [E]."""
    rows = first_feedback(log)
    rows = rows[(log.before(before_day) & ~log.before(from_day))[rows]]
    labels = (log.feedback[rows] == DISLIKE).astype(np.float32)
    return Candidates(log.user[rows], log.item[rows], log.moments(context, rows)), labels


def shown_candidates(log: EventLog, context: str, from_day: int, before_day: int) -> tuple[Candidates, np.ndarray]:
    """User-item pairs whose first event, judged or not, lies on days [from_day, before_day), and whether the user
    disliked the item by the end of that day (negfast's choice), bool [E]."""
    key = log.user.astype(np.int64) * log.n_items + log.item
    rows = np.flatnonzero(log.feedback != WITHDRAWN)
    rows = rows[np.sort(np.unique(key[rows], return_index=True)[1])]
    rows = rows[(log.before(before_day) & ~log.before(from_day))[rows]]
    days = log.day
    disliked = log.feedback == DISLIKE
    last = int(days.max()) + 1
    same_day = np.isin(key[rows] * last + days[rows], key[disliked] * last + days[disliked])
    return Candidates(log.user[rows], log.item[rows], log.moments(context, rows)), same_day


def verdict_start(log: EventLog, fit_until: int) -> int:
    """The first day whose feedback is learned from."""
    first_day = int(log.day.min())
    return min(first_day + WARM_UP_DAYS, (first_day + fit_until) // 2)


def verdict_features(engine: Engine, candidates: Candidates) -> np.ndarray:
    """What the verdict looks at, float32 [E, verdict_features]; many candidates at once cost least."""
    return engine.features.rich(candidates.user, candidates.item, candidates.moment)


def candidate_logits(engine: Engine, candidates: Candidates) -> np.ndarray:
    """Logits float64 [E] of P(dislike) for every candidate."""
    return verdict_logits(engine.policy.verdict, verdict_features(engine, candidates))


@torch.inference_mode()
def verdict_logits(verdict: Verdict, features: np.ndarray) -> np.ndarray:
    """Logits float64 [E] of P(dislike) for features float32 [E, C]."""
    return verdict(put(features, verdict.edges.device)).double().cpu().numpy()


def verdict_examples(log: EventLog, context: str, fit_until: int) -> tuple[Candidates, np.ndarray, int]:
    """First feedback of the train days, where training starts from, at most `EXAMPLES` of it; whether each is a
    dislike, float32 [E]; and how much there is."""
    candidates, labels = first_feedback_candidates(log, context, verdict_start(log, fit_until), fit_until)
    drawn = sample_pairs(candidates.user, candidates.item, EXAMPLES)
    return candidates.take(drawn), labels[drawn], len(labels)


def fit_verdict(engine: Engine) -> tuple[int, int]:
    """Fits the verdict to `verdict_examples`; of how many judgements, and how many there are."""
    candidates, labels, there = verdict_examples(engine.log, engine.config.history.context, engine.fit_until)
    if not 0 < labels.sum() < len(labels):
        return 0, there
    fit(engine.policy.verdict, verdict_features(engine, candidates), labels, engine.config.train.seed)
    return len(labels), there


@dataclass(frozen=True)
class Calibration:
    """Platt scaling of verdict logits, fitted on valid: P(dislike) = sigmoid(slope * logit + intercept).

    Fitted on first likes and dislikes it is P(dislike | the user gives feedback), on what was shown P(dislike | shown).
    """

    slope: float
    intercept: float
    threshold: float  # probability at or above which 10 % of the valid events lie

    def probability(self, logit: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.slope * logit + self.intercept)))
