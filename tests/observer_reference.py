"""Observers written once more in numpy, slowly; shared by tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from compression_manager.quantization import (
    HistogramCalibration,
    MinMaxCalibration,
    MovingAverageCalibration,
    PercentileCalibration,
    QuantizationScheme,
    QuantizationSite,
)

CALIBRATIONS = {
    "min_max": MinMaxCalibration(),
    "moving_average": MovingAverageCalibration(0.3),
    "percentile": PercentileCalibration(90.0, bins=256),
    "squared_error": HistogramCalibration("squared_error", bins=256),
    "kl_divergence": HistogramCalibration("kl_divergence", bins=256),
}
BINNED = ("percentile", "squared_error", "kl_divergence")


def scheme(
    bits: int = 4, symmetric: bool = False, axis: int | None = None, **options: Any
) -> QuantizationScheme:
    """A scheme per tensor, or per channel of `axis`."""
    granularity = options.pop("granularity", "tensor" if axis is None else "channel")
    return QuantizationScheme(bits, symmetric, granularity, axis, **options)


def observer(kind: Any, of: QuantizationScheme, channels: int | None = None) -> Any:
    """An observer of an activation; `kind` is a calibration or a name from above."""
    calibration = CALIBRATIONS.get(kind, kind) if isinstance(kind, str) else kind
    return calibration.make_observer(of, QuantizationSite("conv", "activation", channels))


def fed(target: Any, batches: Iterable[np.ndarray]) -> Any:
    """The observer after these batches."""
    for batch in batches:
        target.observe(torch.as_tensor(batch))
    return target


def lines(values: np.ndarray, axis: int | None) -> np.ndarray:
    """The values of each channel, (channels, n)."""
    if axis is None:
        return values.reshape(1, -1)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def groups(values: np.ndarray, size: int) -> list[np.ndarray]:
    """The values of each group, row by row."""
    rows = values.reshape(values.shape[0], -1)
    return [row[at : at + size] for row in rows for at in range(0, row.size, size)]


def bin_width(values: np.ndarray, bins: int) -> tuple[float, int]:
    """Width of the finest power-of-two bins over the values and zero, and the first multiple."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    exponent = -126
    if low < high:
        exponent = max(exponent, math.frexp(high - low)[1] - 1 - bins.bit_length())
    while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) >= bins:
        exponent += 1
    return 2.0**exponent, math.floor(low / 2.0**exponent)


def histogram(values: np.ndarray, bins: int) -> np.ndarray:
    """Counts of the values in these bins."""
    width, first = bin_width(values, bins)
    index = np.floor(values.astype(np.float64) / width).astype(np.int64) - first
    return np.bincount(index.reshape(-1), minlength=bins)


def centres(values: np.ndarray, bins: int) -> np.ndarray:
    """Centres of the bins, float64."""
    width, first = bin_width(values, bins)
    return (first + np.arange(bins) + 0.5) * width


def quantized(points: np.ndarray, low: float, high: float, of: QuantizationScheme) -> np.ndarray:
    """Fake quantization in float64, with the scale of the range."""
    bottom, top = of.quant_min, of.quant_max
    low, high = min(low, 0.0), max(high, 0.0)
    if of.symmetric:
        steps = (top - bottom) / 2 if of.bits > 1 else 1.0
        scale, zero_point = max(-low, high) / steps, of.symmetric_zero_point
    else:
        scale = (high - low) / (top - bottom)
        zero_point = np.clip(bottom - np.rint(low / max(scale, 2.0**-23)), bottom, top)
    scale = max(scale, 2.0**-23)
    return (np.clip(np.rint(points / scale) + zero_point, bottom, top) - zero_point) * scale


def squared_error(
    points: np.ndarray, counts: np.ndarray | float, low: float, high: float, of: QuantizationScheme
) -> float:
    """Squared error of quantizing `points`, each `counts` times."""
    change = quantized(points, low, high, of) - points
    return float((np.asarray(counts) * change * change).sum())


def least_squared_error(
    points: np.ndarray, counts: np.ndarray | float, of: QuantizationScheme, steps: int = 60
) -> float:
    """The least error of an exhaustive search over ranges down to 1/256 of the whole."""
    low, high = min(points.min(), 0.0), max(points.max(), 0.0)
    factors = 2.0 ** -np.linspace(0, 8, steps if not of.symmetric else 8 * steps)
    error: Callable[[float, float], float] = lambda a, b: squared_error(points, counts, a, b, of)
    if of.symmetric:
        return min(error(low * factor, high * factor) for factor in factors)
    lows = factors if low < 0 else [1.0]
    highs = factors if high > 0 else [1.0]
    return min(error(low * a, high * b) for a in lows for b in highs)


def least_divergence(values: np.ndarray, bins: int, of: QuantizationScheme) -> float:
    """The clipping value of TensorRT's convention, bin by bin."""
    width, first = bin_width(values, bins)
    signed = histogram(values, bins)
    counts = np.zeros(bins)
    for index, count in enumerate(signed):
        at = first + index
        counts[at if at >= 0 else -1 - at] += count
    stop = int(counts.nonzero()[0].max()) + 1
    counts[0] = counts[1]
    one_sided = values.min() >= 0 or values.max() <= 0
    levels = 2**of.bits if one_sided and not of.symmetric else 2 ** (of.bits - 1)
    best, chosen = math.inf, stop
    for size in range(levels, stop + 1):
        reference = counts[:size].copy()
        reference[-1] += counts[size:].sum()
        filled = counts[:size] > 0
        level = (np.arange(size) * levels) // size
        members = np.bincount(level[filled], minlength=levels)
        in_level = np.bincount(level, counts[:size], minlength=levels)
        candidate = np.where(filled, in_level[level] / np.maximum(members[level], 1), 0.0)
        divergence = _divergence(reference, candidate)
        if divergence <= best + 1e-12:
            best, chosen = min(best, divergence), size
    return chosen * width


def _divergence(reference: np.ndarray, candidate: np.ndarray) -> float:
    some = reference > 0
    if candidate.sum() == 0 or (candidate[some] == 0).any():
        return math.inf
    p = reference[some] / reference.sum()
    q = candidate[some] / candidate.sum()
    return float((p * np.log(p / q)).sum())
