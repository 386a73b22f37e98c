"""The verdict task: will this user dislike this item, if it is consumed? Context strictly before the moment."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negfast.data.log import DISLIKE, WITHDRAWN, EventLog
from negfast.data.split import first_feedback, sample_pairs
from negfast.model.histories import MIXED, Histories
from negfast.model.policy import Policy
from negfast.model.verdict_prior import fit
from negfast.runtime.engine import Engine
from negfast.staging import put

CANDIDATES_AT_ONCE = 4096
PRIOR_EXAMPLES = 200_000  # that the verdict's prior is fitted to, at most (negfast's choice)
MEASURED_AT_MOST = 100_000  # candidates that a calibration or an AUC of training is made of (negfast's choice)
WARM_UP_DAYS = 30  # of the log are left out: rates mean little before (negfast's choice)


@dataclass(frozen=True)
class Candidates:
    """Candidates of G users at moments: group g has ``items[offsets[g]:offsets[g + 1]]``, asked at its moment."""

    user: np.ndarray  # int32 [G]
    moment: np.ndarray  # int64 [G], seconds; in context "day" the start of the candidates' day
    offsets: np.ndarray  # int64 [G + 1]
    items: np.ndarray  # int32 [E]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def group_of_item(self) -> np.ndarray:
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def sample(self, most: int) -> tuple["Candidates", np.ndarray]:
        """At most ``most`` of the candidates, by `sample_pairs`, and their places in ``items``."""
        owner = self.group_of_item
        places = sample_pairs(self.user[owner], self.items, most)
        owner = owner[places]
        return group_candidates(self.user[owner], self.moment[owner], self.items[places]), places

    def split(self, most: int) -> "Candidates":
        """The same with at most ``most`` candidates a group: longer ones are several of the same user and moment."""
        counts = np.diff(self.offsets)
        pieces = -(-counts // most)
        group = np.repeat(np.arange(len(self)), pieces)
        place = np.arange(len(group)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        offsets = np.append(self.offsets[group] + place * most, self.offsets[-1])
        return Candidates(self.user[group], self.moment[group], offsets, self.items)

    def take(self, groups: np.ndarray) -> tuple["Candidates", np.ndarray]:
        """The groups at ``groups``, and the places of their candidates in ``items``."""
        counts = np.diff(self.offsets)[groups]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][groups] - offsets[:-1], counts)
        return Candidates(self.user[groups], self.moment[groups], offsets, self.items[places]), places


def first_feedback_candidates(
    log: EventLog, context: str, from_day: int, before_day: int, among: np.ndarray | None = None
) -> tuple[Candidates, np.ndarray]:
    """The first like or dislike of every user-item pair on days [from_day, before_day), grouped by user and moment in
    the context, and whether each is a dislike, float32 [E]; of the items of the mask ``among`` bool [I] alone, where
    given."""
    rows = first_feedback(log)
    rows = rows[(log.before(before_day) & ~log.before(from_day))[rows]]
    if among is not None:
        rows = rows[among[log.item[rows]]]
    labels = (log.feedback[rows] == DISLIKE).astype(np.float32)
    return group_candidates(log.user[rows], log.moments(context)[rows], log.item[rows]), labels


def shown_candidates(log: EventLog, context: str, from_day: int, before_day: int) -> tuple[Candidates, np.ndarray]:
    """User-item pairs whose first event, judged or not, lies on days [from_day, before_day), grouped by user and moment
    in the context, and whether the user disliked the item by the end of that day (negfast's choice), bool [E]."""
    key = log.user.astype(np.int64) * log.n_items + log.item
    rows = np.flatnonzero(log.feedback != WITHDRAWN)
    rows = rows[np.sort(np.unique(key[rows], return_index=True)[1])]
    rows = rows[(log.before(before_day) & ~log.before(from_day))[rows]]
    days = log.day
    disliked = log.feedback == DISLIKE
    last = int(days.max()) + 1
    same_day = np.isin(key[rows] * last + days[rows], key[disliked] * last + days[disliked])
    return group_candidates(log.user[rows], log.moments(context)[rows], log.item[rows]), same_day


def verdict_start(log: EventLog, fit_until: int) -> int:
    """The first day whose feedback is learned from."""
    first_day = int(log.day.min())
    return min(first_day + WARM_UP_DAYS, (first_day + fit_until) // 2)


def group_candidates(user: np.ndarray, moment: np.ndarray, items: np.ndarray) -> Candidates:
    """Candidates from columns [E], ``moment`` in seconds, in which equal (user, moment) stand together."""
    starts = np.flatnonzero((np.diff(user, prepend=-1) != 0) | (np.diff(moment, prepend=-1) != 0))
    offsets = np.append(starts, len(user))
    return Candidates(user[starts].astype(np.int32), moment[starts].astype(np.int64), offsets, items.astype(np.int32))


@dataclass(frozen=True)
class VerdictInputs:
    """Candidates as the policy reads them: branches of their users' histories."""

    histories: Histories
    branches: np.ndarray  # int64 [E], of each candidate
    tokens: Tensor  # int64 [E, n, S]
    item_text: Tensor | None  # float16 [E, n, D]
    features: Tensor  # float32 [E, width], of the prior


def read_candidates(
    engine: Engine, candidates: Candidates, view: int = MIXED, features: np.ndarray | None = None
) -> VerdictInputs:
    """Histories, tokens and features of candidates, on the device; ``features`` as `verdict_inputs` takes them."""
    none = np.zeros(len(candidates), dtype=bool)
    histories = engine.histories.build(candidates.user, candidates.moment, view, none)
    return verdict_inputs(engine, candidates, histories, np.arange(len(candidates)), features)


def verdict_inputs(
    engine: Engine,
    candidates: Candidates,
    histories: Histories,
    branches: np.ndarray,
    features: np.ndarray | None = None,
) -> VerdictInputs:
    """The same of histories that are read already; ``branches`` int64 [G] are those of the candidates' groups,
    ``features`` [E, width] those of `prior_features`, if they are there."""
    features = prior_features(engine, candidates) if features is None else features
    of_candidate = branches[candidates.group_of_item]
    gap = histories.gap[put(of_candidate, engine.device)]
    items = put(candidates.items, engine.device).long()
    tokens, text = engine.histories.candidate_tokens(items, gap), engine.histories.text_of(items)
    return VerdictInputs(histories, of_candidate, tokens, text, _on_device(engine, features))


def verdict_logits(policy: Policy, inputs: VerdictInputs) -> Tensor:
    """Logit [E] of P(dislike) for every candidate."""
    states = inputs.histories.states(policy, inputs.branches, inputs.tokens, inputs.item_text)
    return policy.verdict_logit(states[:, -1], inputs.features)


def prior_features(engine: Engine, candidates: Candidates) -> np.ndarray:
    """What the verdict's prior looks at, float32 [E, verdict_features]; many candidates at once cost least."""
    owner = candidates.group_of_item
    return engine.features.rich(candidates.user[owner], candidates.items, candidates.moment[owner]).astype(np.float32)


@torch.inference_mode()
def prior_logits(engine: Engine, candidates: Candidates) -> np.ndarray:
    """Logits [E] of the verdict's prior alone."""
    return engine.policy.verdict_prior(_on_device(engine, prior_features(engine, candidates))).cpu().numpy()


def _on_device(engine: Engine, features: np.ndarray) -> Tensor:
    return put(features, engine.device)


def fit_prior(engine: Engine) -> tuple[int, int]:
    """Fits the verdict's prior to first feedback of the train days, where training starts from; of how many judgements,
    and how many there are."""
    candidates, labels = first_feedback_candidates(
        engine.log, engine.config.history.context, verdict_start(engine.log, engine.fit_until), engine.fit_until
    )
    there = len(labels)
    candidates, places = candidates.sample(PRIOR_EXAMPLES)
    labels = labels[places]
    if not 0 < labels.sum() < len(labels):
        return 0, there
    fit(engine.policy.verdict_prior, prior_features(engine, candidates), labels, engine.config.train.seed)
    return len(labels), there


@torch.inference_mode()
def candidate_logits(engine: Engine, candidates: Candidates, view: int = MIXED) -> np.ndarray:
    """Verdict logits float64 [E] of candidates, in batches that share histories."""
    out = np.empty(len(candidates.items))
    features = prior_features(engine, candidates)
    candidates = candidates.split(CANDIDATES_AT_ONCE)
    order = np.lexsort((candidates.moment, candidates.user))
    counts = np.diff(candidates.offsets)[order]
    batch_of = (np.cumsum(counts) - counts) // CANDIDATES_AT_ONCE
    for batch in np.unique(batch_of):
        part, places = candidates.take(order[batch_of == batch])
        out[places] = (
            verdict_logits(engine.policy, read_candidates(engine, part, view, features[places])).double().cpu().numpy()
        )
    return out


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
