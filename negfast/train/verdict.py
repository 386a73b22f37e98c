"""The verdict task: will this user dislike this item, if it is consumed? Context strictly before the item's day."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from negfast.data.log import DISLIKE, EventLog
from negfast.data.split import first_feedback
from negfast.model.prompts import MIXED
from negfast.model.verdict_prior import fit
from negfast.train.engine import Engine, epoch_rows
from negfast.train.step import WHOLE, Share

GROUPS_AT_ONCE = 128
WARM_UP_DAYS = 30  # of the log are left out: rates mean little before (negfast's choice)


@dataclass(frozen=True)
class Candidates:
    """Candidates of G user-days: group g has ``items[offsets[g]:offsets[g + 1]]``; the context ends before the day."""

    user: np.ndarray  # int32 [G]
    day: np.ndarray  # int32 [G], the candidates' day
    offsets: np.ndarray  # int64 [G + 1]
    items: np.ndarray  # int32 [E]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def group_of_item(self) -> np.ndarray:
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def take(self, groups: np.ndarray) -> tuple["Candidates", np.ndarray]:
        """The groups at ``groups``, and the places of their candidates in ``items``."""
        counts = np.diff(self.offsets)[groups]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][groups] - offsets[:-1], counts)
        return Candidates(self.user[groups], self.day[groups], offsets, self.items[places]), places


def told_candidates(
    log: EventLog, from_day: int, before_day: int, among: np.ndarray | None = None
) -> tuple[Candidates, np.ndarray]:
    """The first like or dislike of every user-item pair on days [from_day, before_day), grouped by user-day, and
    whether each is a dislike, float32 [E]; of the items of the mask ``among`` bool [I] alone, where given."""
    rows = first_feedback(log)
    days = log.day
    rows = rows[(days[rows] >= from_day) & (days[rows] < before_day)]
    if among is not None:
        rows = rows[among[log.item[rows]]]
    return group_candidates(log.user[rows], days[rows], log.item[rows]), (log.feedback[rows] == DISLIKE).astype(
        np.float32
    )


def group_candidates(user: np.ndarray, day: np.ndarray, items: np.ndarray) -> Candidates:
    """Candidates from columns [E] in which equal (user, day) stand together."""
    starts = np.flatnonzero((np.diff(user, prepend=-1) != 0) | (np.diff(day, prepend=-1) != 0))
    offsets = np.append(starts, len(user))
    return Candidates(user[starts].astype(np.int32), day[starts].astype(np.int32), offsets, items.astype(np.int32))


def verdict_logits(engine: Engine, candidates: Candidates, view: int = MIXED) -> Tensor:
    """Logit [E] of P(dislike) for every candidate: one prompt a user-day, its candidates as answers."""
    before = candidates.day - 1
    counts = np.diff(candidates.offsets)
    batch = engine.prompts.build(candidates.user, before, view, counts, trending=False)
    codes = engine.prompts.item_token_ids[torch.from_numpy(candidates.items).to(engine.device).long()]
    answers = F.pad(codes, (0, 1), value=engine.policy.vocabulary.marker("verdict"))
    hidden = engine.policy.hidden(batch.layout, batch.tokens, answers, prompt_rows="none")
    last = hidden.view(*answers.shape, -1)[:, -1]
    return engine.policy.verdict_logit(last, _on_device(engine, prior_features(engine, candidates)))


def prior_features(engine: Engine, candidates: Candidates) -> np.ndarray:
    """What the verdict's prior looks at, float64 [E, verdict_features]."""
    owner = candidates.group_of_item
    return engine.features.rich(candidates.user[owner], candidates.items, candidates.day[owner])


@torch.no_grad()
def prior_logits(engine: Engine, candidates: Candidates) -> np.ndarray:
    """Logits [E] of the verdict's prior alone."""
    return engine.policy.verdict_prior(_on_device(engine, prior_features(engine, candidates))).cpu().numpy()


def _on_device(engine: Engine, features: np.ndarray) -> Tensor:
    return torch.from_numpy(features.astype(np.float32)).to(engine.device)


def fit_prior(engine: Engine) -> None:
    """Fits the verdict's prior to the first feedback of the train days: where training starts from."""
    task = VerdictTask(engine, 1)
    candidates = task.candidates
    if not 0 < task.labels.sum() < len(task.labels):
        return
    features = prior_features(engine, candidates)
    fit(engine.policy.verdict_prior, features, task.labels, engine.config.train.seed)


class VerdictTask:
    """Verdicts on the first feedback of train days."""

    def __init__(self, engine: Engine, batch: int, among: np.ndarray | None = None) -> None:
        """``batch``: user-days a step; ``among`` bool [I]: of these items alone."""
        first_day = int(engine.log.day.min())
        start = min(first_day + WARM_UP_DAYS, (first_day + engine.fit_until) // 2)
        self.engine, self.batch = engine, batch
        self.candidates, self.labels = told_candidates(engine.log, start, engine.fit_until, among)

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, int]:
        """(the share's part of the mean binary cross entropy over candidates, tokens) of a step's user-days."""
        whole = epoch_rows(self.engine.config.train.seed, "verdict", step, len(self.candidates), self.batch)
        count = int(np.diff(self.candidates.offsets)[whole].sum())
        candidates, places = self.candidates.take(whole[share.of(len(whole))])
        labels = torch.from_numpy(self.labels[places]).to(self.engine.device)
        logits = verdict_logits(self.engine, candidates)
        tokens = len(candidates.items) * (self.engine.trie.levels + 1)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / count, tokens

    @torch.no_grad()
    def logits(self) -> np.ndarray:
        """Logits [E] of all candidates, without gradients."""
        parts = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(self.candidates), GROUPS_AT_ONCE):
            groups = np.arange(start, min(start + GROUPS_AT_ONCE, len(self.candidates)))
            parts.append(verdict_logits(self.engine, self.candidates.take(groups)[0]).float().cpu().numpy())
        return np.concatenate(parts)
