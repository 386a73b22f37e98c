"""SASRec (arXiv 1808.09781): a causal transformer over item embeddings; the sequence of events -> the next one.

``sasrec-dislikes`` reads and predicts dislikes, ``sasrec-all`` every event, and both are judged by the items that the
user goes on to dislike. Softmax over the target and shared uniform negatives in place of the paper's one negative,
which is known to serve SASRec better (arXiv 2308.07192). Each user's sequence holds the first counted event of every
item; it starts with a learned token, so that a user without history gets predictions too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfast.data.log import DISLIKE, EXPOSED, LIKE, EventLog, history_ends
from negfast.evaluate.baselines.ranking import HALF_LIFE
from negfast.evaluate.predictions import TOP, Predictions
from negfast.evaluate.sets import EvalSet
from negfast.sid.prior import DecayedMass

MASS_EPS = 0.01  # of an item without events lately, under the logarithm
_BLOCK = 256  # prompts scored against all items at a time


@dataclass(frozen=True)
class SasRecSettings:
    """Chosen on MovieTweetings' valid split, the best of fifteen settings."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    length: int = 50  # events read; longer histories are trained on in windows
    dropout: float = 0.2
    epochs: int = 30
    batch: int = 128  # windows a step
    negatives: int = 1024  # shared by a step
    lr: float = 1e-3
    recency: float = 0.0  # weight of the log decayed mass of the item's events, added to its logit


DEFAULTS = {
    "sasrec-dislikes": SasRecSettings(width=32, dropout=0.5, epochs=20, recency=0.5),
    "sasrec-all": SasRecSettings(dropout=0.2, epochs=5, recency=1.0),
}
KINDS = {"sasrec-dislikes": (DISLIKE,), "sasrec-all": (EXPOSED, LIKE, DISLIKE)}


def sasrec_predictions(
    log: EventLog, evalsets: Sequence[EvalSet], fit_until: int, seed: int = 0
) -> list[dict[str, Predictions]]:
    """Both rows for every evaluation set: generated items and pool scores; trained on events before ``fit_until``.

    Without such an event the row is left out.
    """
    predictions: list[dict[str, Predictions]] = [{} for _ in evalsets]
    for name, settings in DEFAULTS.items():
        sequences = Sequences.of(log, KINDS[name])
        if not sequences.known(fit_until).any():
            continue
        model = fit_sasrec(sequences, fit_until, settings, seed)
        for evalset, of_set in zip(evalsets, predictions, strict=True):
            of_set[name] = predict_sasrec(log, sequences, model, evalset)
    return predictions


@dataclass(frozen=True)
class Sequences:
    """The first counted event of every user-item pair, by user and time."""

    offsets: np.ndarray  # int64 [U + 1]
    item: np.ndarray  # int32 [M]
    day: np.ndarray  # int32 [M]
    mass: DecayedMass  # of the counted events by item
    first_day: int  # day 0 of ``mass``: the day before the log's first
    log: EventLog
    rows: np.ndarray  # int64 [M], of the events in ``log``

    @classmethod
    def of(cls, log: EventLog, kinds: Sequence[int]) -> "Sequences":
        rows = np.flatnonzero(np.isin(log.feedback, kinds))
        user = log.user[rows]
        _, first = np.unique(user.astype(np.int64) * log.n_items + log.item[rows], return_index=True)
        first.sort()
        rows, user = rows[first], user[first]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=log.n_users))])
        day = log.day
        low, days = int(day.min()) - 1, int(day.max() - day.min()) + 2
        counted = np.isin(log.feedback, kinds)
        keys = log.item[counted].astype(np.int64) * days + (day[counted] - low)
        mass = DecayedMass.build(keys, days, HALF_LIFE, dtype=torch.float64)
        return cls(offsets, log.item[rows], day[rows], mass, low, log, rows)

    def log_mass(self, item: Tensor, day: np.ndarray) -> Tensor:
        """Log decayed mass of ``item`` int64 at the end of ``day`` (since 1970), shapes broadcast together, float32."""
        row = torch.from_numpy(day.astype(np.int64) - self.first_day)
        return (self.mass.at(item, row) + MASS_EPS).log().float()

    def known(self, fit_until: int) -> np.ndarray:
        """Which of the events may be learned from, bool [M]."""
        return self.log.before(fit_until)[self.rows]


class SasRec(nn.Module):
    """Hidden states of sequences, and logits of items against them; token I starts every sequence, I + 1 pads."""

    def __init__(self, n_items: int, settings: SasRecSettings) -> None:
        super().__init__()
        self.n_items, self.settings = n_items, settings
        self.items = nn.Embedding(n_items + 2, settings.width)
        self.places = nn.Embedding(settings.length + 1, settings.width)
        layer = nn.TransformerEncoderLayer(
            settings.width,
            settings.heads,
            2 * settings.width,
            settings.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, settings.layers, nn.LayerNorm(settings.width), False)
        self.drop = nn.Dropout(settings.dropout)
        for embedding in (self.items, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, T, width] of tokens int64 [B, T]; padding stands at the end, where causality hides it."""
        size = tokens.shape[1]
        hidden = self.drop(self.items(tokens) + self.places.weight[:size])
        return self.layers(hidden, mask=nn.Transformer.generate_square_subsequent_mask(size), is_causal=True)


def fit_sasrec(
    sequences: Sequences,
    fit_until: int,
    settings: SasRecSettings,
    seed: int,
    after_epoch: Callable[[int, "SasRec"], None] = lambda epoch, model: None,
) -> "SasRec":
    """Trains on the events of days before ``fit_until``. Deterministic for a seed and a number of threads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SasRec(sequences.log.n_items, settings)
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, betas=(0.9, 0.98))
        windows = training_windows(sequences, fit_until, settings.length)
        for epoch in range(settings.epochs):
            train_epoch(model.train(), optimizer, sequences, windows)
            after_epoch(epoch + 1, model.eval())
    return model.eval()


def training_windows(sequences: Sequences, fit_until: int, length: int) -> np.ndarray:
    """Windows (first event, one past the last) of at most ``length`` events before ``fit_until``, int64 [W, 2]."""
    known = np.concatenate([[0], np.cumsum(sequences.known(fit_until))])
    begin = sequences.offsets[:-1]
    count = known[sequences.offsets[1:]] - known[begin]  # a user's events are in order, so the known ones come first
    parts = -(-count // length)
    start = np.repeat(begin, parts) + length * (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts))
    return np.stack([start, np.minimum(start + length, np.repeat(begin + count, parts))], axis=1)


def train_epoch(model: SasRec, optimizer: torch.optim.Optimizer, sequences: Sequences, windows: np.ndarray) -> None:
    """One pass over the windows, those of similar length together."""
    settings, n_items = model.settings, model.n_items
    size = np.diff(windows, axis=1)[:, 0]
    order = np.lexsort((torch.rand(len(windows)).numpy(), size))
    batches = [order[k : k + settings.batch] for k in range(0, len(order), settings.batch)]
    for b in torch.randperm(len(batches)).tolist():
        start, stop = windows[batches[b]].T
        tokens, event = padded(sequences, start, stop, n_items)
        there = event[:, 1:] >= 0  # the target of a place is the next place's event
        target = torch.from_numpy(sequences.item[event[:, 1:][there]]).long()
        drawn = torch.randint(n_items, (settings.negatives,))
        hidden = model(torch.from_numpy(tokens[:, :-1]))[torch.from_numpy(there)]
        positive = (hidden * model.items(target)).sum(1)
        negative = hidden @ model.items(drawn).T
        if settings.recency:
            day = sequences.day[event[:, 1:][there]] - 1  # known at the end of the day before
            positive = positive + settings.recency * sequences.log_mass(target, day)
            negative = negative + settings.recency * sequences.log_mass(drawn, day[:, None])
        negative = negative.masked_fill(drawn == target[:, None], -torch.inf)
        logits = torch.cat([positive[:, None], negative], dim=1)
        loss = F.cross_entropy(logits, torch.zeros(len(target), dtype=torch.long))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def padded(sequences: Sequences, start: np.ndarray, stop: np.ndarray, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64 [B, 1 + T] of windows of events, and the event of each place, -1 where there is none."""
    place = np.arange(-1, int((stop - start).max(initial=0)))
    event = start[:, None] + place
    there = (place >= 0) & (event < stop[:, None])
    tokens = np.where(there, sequences.item[np.where(there, event, 0)], n_items + 1).astype(np.int64)
    tokens[:, 0] = n_items
    return tokens, np.where(there, event, -1)


@torch.no_grad()
def predict_sasrec(log: EventLog, sequences: Sequences, model: SasRec, evalset: EvalSet) -> Predictions:
    """The unseen items of highest score for every request (ties: lower index first), and the pools' scores."""
    requests, n_items = evalset.requests, model.n_items
    user, every_item = requests.user, torch.arange(n_items)
    begin = sequences.offsets[user]
    counted_day = np.repeat(np.arange(log.n_users), np.diff(sequences.offsets)) * 2**32 + sequences.day
    stop = np.searchsorted(counted_day, user.astype(np.int64) * 2**32 + requests.day, side="right")
    start = np.maximum(begin, stop - model.settings.length)
    seen_from, seen_to = log.user_offsets[user], history_ends(log, user, requests.day)
    generated = np.full((len(requests), TOP), -1, np.int32)
    pool_score = np.zeros(evalset.pool_items.shape)
    for first in range(0, len(requests), _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, len(requests)))
        tokens, _ = padded(sequences, start[rows], stop[rows], n_items)
        hidden = model(torch.from_numpy(tokens))[np.arange(len(rows)), (stop - start)[rows]]
        score = (hidden @ model.items.weight[:n_items].T).numpy()
        if model.settings.recency:
            score += model.settings.recency * sequences.log_mass(every_item, requests.day[rows][:, None]).numpy()
        pools = np.flatnonzero((evalset.pool_request >= rows[0]) & (evalset.pool_request <= rows[-1]))
        pool_score[pools] = score[evalset.pool_request[pools, None] - first, evalset.pool_items[pools]]
        for k, row in enumerate(rows):
            score[k, log.item[seen_from[row] : seen_to[row]]] = -np.inf
        best = np.argsort(-score, axis=1, kind="stable")[:, :TOP]
        found = np.where(np.isfinite(np.take_along_axis(score, best, axis=1)), best, -1)
        generated[rows, : found.shape[1]] = found
    return Predictions(generated=generated, pool_score=pool_score, kind="baseline")
