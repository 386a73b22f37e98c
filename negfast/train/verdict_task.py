"""The verdict task of training: first feedback of the train days, and its loss."""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from negfast.model.histories import MIXED, Histories
from negfast.runtime.engine import Engine
from negfast.runtime.verdict import (
    VerdictInputs,
    first_feedback_candidates,
    verdict_inputs,
    verdict_logits,
    verdict_start,
)
from negfast.staging import put
from negfast.train.histories import Drawn, HistoryTask
from negfast.train.step import WHOLE, MicroBatch


@dataclass(frozen=True)
class VerdictBatch:
    """A micro-batch's candidates and what became of them."""

    inputs: VerdictInputs
    labels: Tensor  # float32 [E]
    candidates: int  # of the whole batch

    @property
    def tokens(self) -> int:
        """With those of its histories."""
        return len(self.inputs.histories.tokens) + self.candidate_tokens

    @property
    def candidate_tokens(self) -> int:
        return self.inputs.tokens.shape[0] * self.inputs.tokens.shape[1]


class TrainVerdicts:
    """First feedback of train days, and whether each is a dislike."""

    def __init__(self, engine: Engine, among: np.ndarray | None = None) -> None:
        """``among`` bool [I]: of these items alone."""
        start = verdict_start(engine.log, engine.fit_until)
        self.engine = engine
        self.candidates, self.labels = first_feedback_candidates(
            engine.log, engine.config.history.context, start, engine.fit_until, among
        )

    def of_histories(
        self, histories: Histories, branches: np.ndarray, drawn: Drawn, micro_batch: MicroBatch
    ) -> VerdictBatch | None:
        """The verdicts of the micro-batch's histories, whose groups branch off at ``branches`` int64 [G]."""
        count = int(np.diff(self.candidates.offsets)[drawn.groups].sum())
        _, _, groups = drawn.part(micro_batch)
        if not len(mine := drawn.groups[groups]):
            return None
        candidates, places = self.candidates.take(mine)
        inputs = verdict_inputs(self.engine, candidates, histories, branches)
        return VerdictBatch(inputs, put(self.labels[places], self.engine.device), count)

    def loss(self, batch: VerdictBatch) -> Tensor:
        """The micro-batch's part of the mean binary cross entropy over candidates."""
        logits = verdict_logits(self.engine.policy, batch.inputs)
        return F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum") / batch.candidates


class VerdictTask(TrainVerdicts):
    """Verdicts as a task of their own, ``histories`` a step."""

    def __init__(self, engine: Engine, histories: int, among: np.ndarray | None = None) -> None:
        super().__init__(engine, among)
        none = engine.train_requests.only(np.zeros(0, dtype=np.int64))
        self.histories = histories
        self.task = HistoryTask(engine, "verdict", none, self.candidates)

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> VerdictBatch | None:
        """The micro-batch's verdicts of a step."""
        drawn = self.task.draw(step, self.histories, 0)
        views = np.full(len(drawn.histories), MIXED)
        histories, branches = self.task.read(drawn, micro_batch, views)
        return self.of_histories(histories, branches, drawn, micro_batch)
