"""The verdict, P(user dislikes item): a wide and deep model over piecewise-linear history features."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfast import _core
from negfast.model.inference import Packed, array

BINS = 16  # quantile bins of a feature
WIDTH = _core.PRIOR_WIDTH  # of the deep part's two layers
DROPOUT = 0.5
EPOCHS, BATCH, RATE, WEIGHT_DECAY = 8, 512, 2e-3, 0.1
ROWS_ENCODED = 8192  # at once: encoding takes several times the memory of what it makes


class Verdict(nn.Module):
    """logit P(dislike) = wide(z) + deep(z), z the piecewise-linear encoding of the features.

    A feature becomes one number a quantile bin: 0 below the bin, 1 above, linear within (Gorishniy et al.,
    arXiv 2203.05556), and one that says whether it is unknown (NaN). So the linear part is an additive model of
    piecewise-linear curves, to which the deep part adds what features say together. Fitted once by `fit` and constant
    from there on; it answers 0 before.
    """

    edges: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("edges", torch.arange(BINS + 1.0).repeat(features, 1))  # [features, BINS + 1], ascending
        encoded = features * (BINS + 1)
        self.wide = nn.Linear(encoded, 1)
        self.deep = nn.ModuleList([nn.Linear(encoded, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.last = nn.Linear(WIDTH, 1, bias=False)
        for parameter in (self.wide.weight, self.wide.bias, self.last.weight):
            nn.init.zeros_(parameter)
        self.requires_grad_(False)
        self.packed = Packed(Verdict._in_core)

    def encode(self, features: Tensor) -> Tensor:
        """[R, features * (BINS + 1)] of features [R, features]; bins of no width, and all of an unknown one, are 0."""
        unknown = features.isnan()
        low, width = self.edges[:, :-1], self.edges.diff(dim=1)
        place = (features.unsqueeze(-1) - low) / width.where(width > 0, torch.inf)
        place = place.clamp(0.0, 1.0).masked_fill(unknown.unsqueeze(-1), 0.0)
        return torch.cat([place, unknown.to(place.dtype).unsqueeze(-1)], dim=-1).flatten(1)

    def forward(self, features: Tensor) -> Tensor:
        """Logit [R] of P(dislike) for features [R, features], NaN where unknown."""
        if torch.is_inference_mode_enabled() and features.device.type == "cpu":
            logit = torch.empty(len(features))
            self.packed.of(self).logits(array(features), logit.numpy(), torch.get_num_threads())
            return logit
        return self.logit(self.encode(features))

    def _in_core(self) -> _core.Prior:
        deep = [array(x) for layer in self.deep for x in layer.parameters()]
        wide, bias = array(self.wide.weight[0]), float(self.wide.bias)
        return _core.Prior(
            array(self.edges), deep[0], deep[1], deep[2], deep[3], wide, bias, array(self.last.weight[0])
        )

    def logit(self, encoded: Tensor, dropout: float = 0.0) -> Tensor:
        """Logit [R] of encoded features; ``dropout`` is the share of the deep part's units left out."""
        hidden = encoded
        for layer in self.deep:
            hidden = F.dropout(F.relu(layer(hidden)), dropout)
        return (self.wide(encoded) + self.last(hidden)).squeeze(-1)


def fit(verdict: Verdict, features: np.ndarray, labels: np.ndarray, seed: int) -> None:
    """Fits ``verdict`` to features float [R, C] (NaN unknown) and labels [R] in {0, 1}, by AdamW with a one-cycle rate.

    The same seed gives the same weights; on the CPU, wherever ``verdict`` lies. Needs both labels.
    """
    device = verdict.edges.device
    verdict.cpu().requires_grad_(True)
    verdict.edges.copy_(torch.from_numpy(_quantiles(features)))
    parts = torch.from_numpy(features).float().split(ROWS_ENCODED)
    inputs = torch.empty(len(features), verdict.wide.in_features)
    for rows, part in zip(inputs.split(ROWS_ENCODED), parts, strict=True):
        rows.copy_(verdict.encode(part))
    wanted = torch.from_numpy(labels).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in verdict.deep:
            assert isinstance(layer, nn.Linear)
            layer.reset_parameters()
        optimizer = torch.optim.AdamW(verdict.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        steps = EPOCHS * -(-len(wanted) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2))
        nn.init.constant_(verdict.wide.bias, float(torch.logit(wanted.mean())))
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(wanted)).split(BATCH):
                loss = F.binary_cross_entropy_with_logits(verdict.logit(inputs[rows], DROPOUT), wanted[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    verdict.zero_grad(set_to_none=True)  # what is left here would count in the norm that clips the policy's gradients
    verdict.requires_grad_(False).to(device)


def _quantiles(features: np.ndarray) -> np.ndarray:
    """float32 [C, BINS + 1]; those of a feature that is never known are 0."""
    known = np.where(np.isfinite(features).any(0), features, 0.0)
    return np.nanquantile(known, np.linspace(0, 1, BINS + 1), axis=0).T.astype(np.float32)
