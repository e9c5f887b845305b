"""The quantized teacher's arithmetic once more, in float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np


def smallest_scale(bits: int) -> np.float32:
    """Float32's epsilon, which would cut digits off above 24 bits: its smallest number there."""
    return np.float32(2.0**-23 if bits <= 24 else 2.0**-126)


def levels(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest integer."""
    if not symmetric:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (0, 1) if bits == 1 else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def grid_of(bits: int, symmetric: bool) -> tuple[float, int, int, int]:
    """Scale, zero point and range with nothing but the bits given."""
    return 1 / 2 ** (bits - 1), 0, *levels(bits, symmetric)


def range_grid(logits: Any, bits: int, symmetric: bool) -> tuple[float, int, int, int]:
    """Scale, zero point and range that hold all logits; computed as wide as the framework does."""
    low, high = levels(bits, symmetric)
    kind = np.float64 if bits > 24 else np.float32
    smallest, largest = kind(min(logits.min(), 0)), kind(max(logits.max(), 0))
    if symmetric:
        scale = np.float32(max(-smallest, largest) / kind(max(high, 1)))
        return float(max(scale, smallest_scale(bits))), 0, low, high
    scale = np.float32((largest - smallest) / kind(high - low))
    scale = max(scale, smallest_scale(bits))
    zero_point = low - int(np.rint(smallest / kind(scale)))
    return float(scale), min(max(zero_point, low), high), low, high


def quantized(logits: Any, scale: float, zero_point: int, low: int, high: int) -> Any:
    """The quantized float64 logits; the scale and its reciprocal are float32 numbers."""
    rounded = np.float32(scale)
    inverse = np.float64(np.float32(1) / rounded)
    code = np.clip(np.rint(np.float64(logits) * inverse) + zero_point, low, high)
    return (code - zero_point) * np.float64(rounded)
