"""Sampling noise keyed by what it is for, so that it depends neither on batch layout nor on the number of ranks."""

import torch
from torch import Tensor

BITS = 23
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SIGNED = [c - (1 << 64) if c >= 1 << 63 else c for c in _MIX]


def keyed_rows(seed: int, step: int, request: Tensor, completion: Tensor) -> Tensor:
    """The key of every level's noise of completions, int64 [R], a function of (seed, step, request [R],
    completion [R]); ``request`` int64 is the request's own number (not its place in the batch)."""
    return _mix(_mix(_mix(_mix(torch.full_like(request, seed)) + step) + request) + completion)


def keyed_gumbel(rows: Tensor, level: int, width: int) -> Tensor:
    """Standard Gumbel noise float32 [R, width], a function of (``rows`` [R] of `keyed_rows`, level, column).

    A hash (SplitMix64's finaliser) of the whole key gives each number, so there is no generator state to save or to
    share.
    """
    column = torch.arange(width, device=rows.device)
    return gumbel_of_bits(_mix(_mix(rows + level)[:, None] + column) >> 41 & (1 << BITS) - 1)


def gumbel_of_bits(bits: Tensor) -> Tensor:
    """Standard Gumbel numbers float32 from ``BITS`` uniform bits in int64, finite for every one of them.

    bits + 1/2 must be exact: with a bit more the largest rounds to a uniform number of 1 and infinite noise, which
    would choose even a code that does not exist.
    """
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-BITS
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (arithmetic wraps around; shifts are made logical)."""
    x = x + _SIGNED[0]
    x = (x ^ _shift(x, 30)) * _SIGNED[1]
    x = (x ^ _shift(x, 27)) * _SIGNED[2]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
