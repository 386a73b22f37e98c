"""The verdict, P(user dislikes item): networks over piecewise-linear history features, and boosted trees."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfast import _core
from negfast.model.inference import Packed, array
from negfast.model.trees import Trees, fit_boosted

BINS = 16  # quantile bins of a feature
MEMBERS, WIDTH = _core.VERDICT_MEMBERS, _core.VERDICT_WIDTH  # networks of the deep part, units of a layer of each
DROPOUT = 0.1
EPOCHS, BATCH, RATE, WEIGHT_DECAY = 16, 512, 2e-3, 0.5
ROWS_ENCODED = 8192  # at once: encoding takes several times the memory of what it makes


class Verdict(nn.Module):
    """logit P(dislike) = (networks + trees) / 2, where networks = wide(z) + mean of deep_m(z) over members m, and trees
    are boosted ones (`Trees`). z is the piecewise-linear encoding of the features.

    A feature becomes one number a quantile bin: 0 below the bin, 1 above, linear within (Gorishniy et al.,
    arXiv 2203.05556), and one that says whether it is unknown (NaN). So the linear part is an additive model of
    piecewise-linear curves, to which the deep part adds what features say together: small networks of two hidden
    layers, each trained as if it were alone. Fitted once by `fit` and constant from there on; it answers 0 before.
    """

    edges: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("edges", torch.arange(BINS + 1.0).repeat(features, 1))  # [features, BINS + 1], ascending
        encoded = features * (BINS + 1)
        self.wide = nn.Linear(encoded, 1)
        self.first = nn.Linear(encoded, MEMBERS * WIDTH)
        self.second = nn.Parameter(torch.zeros(MEMBERS, WIDTH, WIDTH))  # [member, in, out]
        self.second_bias = nn.Parameter(torch.zeros(MEMBERS, WIDTH))
        self.last = nn.Parameter(torch.zeros(MEMBERS, WIDTH))
        self.trees = Trees()
        for parameter in (self.wide.weight, self.wide.bias):
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
            return (logit + self.trees(features)) / 2
        parts = features.split(ROWS_ENCODED)
        return torch.cat([(self.logits(self.encode(part)).mean(0) + self.trees(part)) / 2 for part in parts])

    def _in_core(self) -> _core.Verdict:
        weights = self.first.weight, self.first.bias, self.second, self.second_bias, self.last, self.wide.weight[0]
        first, first_bias, second, second_bias, last, wide = map(array, weights)
        wide_bias = float(self.wide.bias)
        return _core.Verdict(array(self.edges), first, first_bias, second, second_bias, last, wide, wide_bias)

    def logits(self, encoded: Tensor, dropout: float = 0.0) -> Tensor:
        """Networks' logits [MEMBERS, R] for encoded features; ``dropout``: the share of the deep part's units left
        out."""
        hidden = F.dropout(F.relu(self.first(encoded)), dropout).unflatten(1, (MEMBERS, WIDTH)).transpose(0, 1)
        hidden = F.dropout(F.relu(torch.baddbmm(self.second_bias.unsqueeze(1), hidden, self.second)), dropout)
        return self.wide(encoded).squeeze(-1) + (hidden @ self.last.unsqueeze(-1)).squeeze(-1)


def fit(verdict: Verdict, features: np.ndarray, labels: np.ndarray, seed: int) -> None:
    """Fits ``verdict`` to features float [R, C] (NaN unknown) and labels [R] in {0, 1}, its networks by AdamW with a
    one-cycle rate.

    The same seed gives the same weights; on the CPU, wherever ``verdict`` lies. Needs both labels.
    """
    device = verdict.edges.device
    verdict.cpu().requires_grad_(True)
    verdict.trees.take(fit_boosted(features, labels, seed))
    verdict.edges.copy_(torch.from_numpy(_quantiles(features)))
    unknown = torch.from_numpy(np.isnan(features).any(0))
    used = torch.cat([verdict.edges.diff(dim=1) > 0, unknown.unsqueeze(1)], dim=1).flatten()  # others are always 0
    parts = torch.from_numpy(features).float().split(ROWS_ENCODED)
    inputs = torch.empty(len(features), int(used.sum()))
    for rows, part in zip(inputs.split(ROWS_ENCODED), parts, strict=True):
        rows.copy_(verdict.encode(part)[:, used])
    wanted = torch.from_numpy(labels).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        verdict.first.reset_parameters()
        nn.init.uniform_(verdict.second, -(WIDTH**-0.5), WIDTH**-0.5)
        layers = verdict.wide, verdict.first
        whole = [layer.weight for layer in layers]
        for layer, weight in zip(layers, whole, strict=True):
            layer.weight = nn.Parameter(weight[:, used])
        optimizer = torch.optim.AdamW(verdict.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        steps = EPOCHS * -(-len(wanted) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2))
        nn.init.constant_(verdict.wide.bias, float(torch.logit(wanted.mean())))
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(wanted)).split(BATCH):
                logits = verdict.logits(inputs[rows], DROPOUT)
                loss = F.binary_cross_entropy_with_logits(logits, wanted[rows].expand_as(logits))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        for layer, weight in zip(layers, whole, strict=True):
            weight.zero_()[:, used] = layer.weight
            layer.weight = weight
    verdict.zero_grad(set_to_none=True)
    verdict.requires_grad_(False).to(device)


def _quantiles(features: np.ndarray) -> np.ndarray:
    """float32 [C, BINS + 1]; those of a feature that is never known are 0."""
    known = np.where(np.isfinite(features).any(0), features, 0.0)
    return np.nanquantile(known, np.linspace(0, 1, BINS + 1), axis=0).T.astype(np.float32)
