"""RQ-VAE: residual quantisation of a learned code of the item embedding (Lee et al., arXiv 2203.01941; TIGER)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfast.sid.kmeans import POINTS_PER_CENTROID, fit_rq_kmeans
from negfast.sid.quantize import Quantizer

# negfast's choice, all of them
HIDDEN, LATENT = 256, 64
STEPS, WARM_UP, BATCH, RATE = 800, 150, 1024, 2e-3  # the warm-up trains the autoencoder without quantisation
COMMITMENT = 0.25  # weight of the term that draws the encoder to the chosen centroids
SETTLE = 0.75  # share of the steps after which no dead code is moved any more


def fit_rq_vae(vectors: np.ndarray, sizes: list[int], codebook: int, seed: int) -> Quantizer:
    """An autoencoder whose latent is quantised by L codebooks that learn with it, on the CPU.

    Gradients pass straight through the quantiser. Codebooks start as residual k-means of the latents, and a code that
    no item chose in a pass over the items moves to the residual of a random one. Level l has min(``sizes[l]``, N)
    centroids. Deterministic for a seed, a number of threads and a machine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Autoencoder(vectors.shape[1])
        rng = np.random.default_rng(seed)
        scale = float(np.sqrt((vectors.astype(np.float64) ** 2).mean())) + 1e-12  # inputs of about unit variance
        data = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32) / np.float32(scale))
        _train(model, data, sizes, codebook, seed, rng)
    return _frozen(model, codebook, scale)


class _Autoencoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))
        self.codebooks = nn.ParameterList()

    def quantise(self, latent: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """(sum of the chosen centroids [B, d], vector quantisation loss, codes and residuals [B, d] of each level)."""
        residual, total, loss = latent, torch.zeros_like(latent), latent.new_zeros(())
        codes, residuals = [], []
        for table in self.codebooks:
            with torch.no_grad():
                code = (table.square().sum(1) - 2 * residual @ table.T).argmin(1)
            chosen = F.embedding(code, table)  # the gradient of table[code] is summed in no fixed order
            loss = loss + F.mse_loss(chosen, residual.detach()) + COMMITMENT * F.mse_loss(residual, chosen.detach())
            codes.append(code)
            residuals.append(residual.detach())
            residual, total = residual - chosen.detach(), total + chosen
        return total, loss, codes, residuals


def _train(
    model: _Autoencoder, data: Tensor, sizes: list[int], codebook: int, seed: int, rng: np.random.Generator
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    batches = max(1, -(-len(data) // BATCH))
    used: list[Tensor] = []  # of this pass over the items, once there are codes
    for step in range(STEPS):
        if step % batches == 0:
            order = torch.from_numpy(rng.permutation(len(data)))
            used = [torch.zeros(len(table), dtype=torch.bool) for table in model.codebooks]
        if step == WARM_UP:
            with torch.no_grad():
                latent = model.encoder(data[order[: POINTS_PER_CENTROID * max(sizes)]]).numpy()
            for table, _ in fit_rq_kmeans(latent, sizes, codebook, seed).levels:
                model.codebooks.append(nn.Parameter(torch.from_numpy(table.copy())))
            optimizer.add_param_group({"params": list(model.codebooks)})
        batch = data[order[step % batches * BATCH :][:BATCH]]
        latent = model.encoder(batch)
        if step < WARM_UP:
            loss = F.mse_loss(model.decoder(latent), batch)
        else:
            chosen, quantisation, codes, _ = model.quantise(latent)
            straight = latent + (chosen - latent).detach()
            loss = F.mse_loss(model.decoder(straight), batch) + quantisation
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if not used:
            continue
        for seen, code in zip(used, codes, strict=True):
            seen[code] = True
        if (step + 1) % batches == 0 and step < SETTLE * STEPS:
            _revive(model, used, data, rng)


@torch.no_grad()
def _revive(model: _Autoencoder, used: list[Tensor], data: Tensor, rng: np.random.Generator) -> None:
    """Moves each code that no item chose to the residual of an item of its own."""
    some = torch.from_numpy(rng.permutation(len(data))[: max(len(seen) for seen in used)])
    residuals = model.quantise(model.encoder(data[some]))[3]
    for table, seen, residual in zip(model.codebooks, used, residuals, strict=True):
        dead = torch.nonzero(~seen)[:, 0]
        table[dead] = residual[: len(dead)]


def _frozen(model: _Autoencoder, codebook: int, scale: float) -> Quantizer:
    network = {
        name: weight.detach().numpy().copy()
        for name, weight in model.state_dict().items()
        if not name.startswith("codebooks")
    }
    network["encoder.0.weight"] /= np.float32(scale)
    network["decoder.2.weight"] *= np.float32(scale)
    network["decoder.2.bias"] *= np.float32(scale)
    codebooks = np.full((len(model.codebooks), codebook, LATENT), np.nan, dtype=np.float32)
    for level, table in enumerate(model.codebooks):
        codebooks[level, : len(table)] = table.detach().numpy()
    return Quantizer.plain(codebooks, network)
