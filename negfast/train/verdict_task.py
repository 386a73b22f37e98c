"""The verdict task of training: batches of first feedback of the train days, and their loss."""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from negfast.runtime.engine import Engine
from negfast.runtime.verdict import (
    VerdictInputs,
    candidate_logits,
    first_feedback_candidates,
    read_candidates,
    verdict_logits,
    verdict_start,
)
from negfast.staging import put
from negfast.train.order import epoch_rows
from negfast.train.step import WHOLE, MicroBatch


@dataclass(frozen=True)
class VerdictBatch:
    """A micro-batch's candidates and what became of them."""

    inputs: VerdictInputs
    labels: Tensor  # float32 [E]
    candidates: int  # of the whole batch
    tokens: int


class VerdictTask:
    """Verdicts on the first feedback of train days."""

    def __init__(self, engine: Engine, batch: int, among: np.ndarray | None = None) -> None:
        """``batch``: users at moments a step; ``among`` bool [I]: of these items alone."""
        start = verdict_start(engine.log, engine.fit_until)
        self.engine, self.batch = engine, batch
        self.candidates, self.labels = first_feedback_candidates(
            engine.log, engine.config.history.context, start, engine.fit_until, among
        )

    def read(self, step: int, micro_batch: MicroBatch = WHOLE) -> VerdictBatch:
        """The micro-batch's user-days of a step."""
        whole = epoch_rows(self.engine.config.train.seed, "verdict", step, len(self.candidates), self.batch)
        count = int(np.diff(self.candidates.offsets)[whole].sum())
        candidates, places = self.candidates.take(whole[micro_batch.of(len(whole))])
        inputs = read_candidates(self.engine, candidates)
        tokens = len(inputs.prompts.tokens) + inputs.tokens.numel()
        return VerdictBatch(inputs, put(self.labels[places], self.engine.device), count, tokens)

    def loss(self, batch: VerdictBatch) -> Tensor:
        """The micro-batch's part of the mean binary cross entropy over candidates."""
        logits = verdict_logits(self.engine.policy, batch.inputs)
        return F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum") / batch.candidates

    def logits(self) -> np.ndarray:
        """Logits [E] of all candidates, without gradients."""
        return candidate_logits(self.engine, self.candidates)
