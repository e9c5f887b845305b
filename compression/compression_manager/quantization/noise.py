"""How much of a signal is left beside the noise that quantization adds."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise) of two sums of squares.

    Infinite without noise; minus infinite without a signal, and where the noise is not finite,
    because a number overflowed.
    """
    if noise == 0.0:
        return math.inf
    if signal == 0.0 or not math.isfinite(noise):
        return -math.inf
    # Not the logarithm of the quotient, which may be too large or too small for a number.
    return 10.0 * (math.log10(signal) - math.log10(noise))


def sqnr_db(exact: Tensor, rounded: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of `rounded`, in decibels (see `decibels`).

    Args:
        exact: floating point, any shape.
        rounded: likewise, same shape.
    """
    # Norms take no memory for squares, and their quotient has half the decibels.
    signal, noise = (
        float(torch.linalg.vector_norm(item, dtype=torch.float64))
        for item in (exact, exact.double() - rounded.double())
    )
    return 2.0 * decibels(signal, noise)
