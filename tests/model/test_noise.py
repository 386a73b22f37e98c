import numpy as np
import torch
from scipy.stats import gumbel_r, kstest

from negfast.model.noise import BITS, gumbel_of_bits, keyed_gumbel, keyed_rows


def test_is_gumbel_and_independent_of_neighbours():
    request = torch.arange(400)
    noise = keyed_gumbel(keyed_rows(0, 3, request, torch.zeros_like(request)), 1, 64)
    assert kstest(noise.numpy().ravel(), gumbel_r.cdf).pvalue > 1e-4
    table = np.corrcoef(noise.numpy().T)
    assert np.abs(table - np.eye(64)).max() < 0.3
    rows = np.corrcoef(noise[:50].numpy())
    assert np.abs(rows - np.eye(50)).max() < 0.6


def test_every_part_of_the_key_counts():
    request, completion = torch.tensor([5]), torch.tensor([2])
    base = keyed_gumbel(keyed_rows(1, 2, request, completion), 0, 8)
    assert (base == keyed_gumbel(keyed_rows(1, 2, request, completion), 0, 8)).all()
    others = [
        keyed_gumbel(keyed_rows(2, 2, request, completion), 0, 8),
        keyed_gumbel(keyed_rows(1, 3, request, completion), 0, 8),
        keyed_gumbel(keyed_rows(1, 2, request + 1, completion), 0, 8),
        keyed_gumbel(keyed_rows(1, 2, request, completion + 1), 0, 8),
        keyed_gumbel(keyed_rows(1, 2, request, completion), 1, 8),
    ]
    assert all((base != other).all() for other in others)
    assert (keyed_gumbel(keyed_rows(1, 2, request, completion), 0, 16)[:, :8] == base).all()


def test_noise_is_finite_for_every_draw():
    bits = torch.tensor([0, 1, (1 << BITS) // 2, (1 << BITS) - 2, (1 << BITS) - 1])
    noise = gumbel_of_bits(bits)
    assert noise.isfinite().all() and (noise.diff() > 0).all()
    exact = -np.log(-np.log((bits.double().numpy() + 0.5) / 2.0**BITS))
    np.testing.assert_allclose(noise.numpy(), exact, rtol=1e-6)
