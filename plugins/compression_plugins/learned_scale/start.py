"""Where learned scales and zero points start."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.arithmetic.parameters import compute_qparams
from compression_manager.ranks import sum_of_ranks
from compression_plugins.learned_scale.arithmetic import sum_per_scale


def start_values(
    low: Tensor, high: Tensor, magnitude: Tensor, scheme: QuantizationScheme, minimum_scale: float
) -> tuple[Tensor, Tensor | None]:
    """Return what `log_scale` and, of affine schemes, `zero_fraction` start at.

    Args:
        low: smallest values, float32 in the shape of the scales.
        high: largest values.
        magnitude: means of |v|.
        scheme: not dynamic.
        minimum_scale: the scale does not start below it.
    """
    scale, zero_point = compute_qparams(low, high, scheme)
    steps = torch.maximum(zero_point - scheme.quant_min, scheme.quant_max - zero_point)
    scale = torch.minimum(scale, 2 * magnitude / steps.sqrt())
    log_scale = scale.clamp(min=minimum_scale).log()
    if scheme.symmetric:
        return log_scale, None
    levels = scheme.quant_max - scheme.quant_min
    return log_scale, ((zero_point.double() - scheme.quant_min) / levels).to(torch.float32)


def mean_magnitude(input: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Return the means of |v| over what shares a scale: float32, in the scales' shape."""
    sums, counts = _sums_and_counts(input, scheme)
    return sums / counts


def mean_magnitude_of_ranks(input: Tensor, scheme: QuantizationScheme, shape: torch.Size) -> Tensor:
    """Return the means of |v| over all ranks' tensors, in the scales' `shape`.

    A rank's tensor may be empty; NaN if all are. Every rank has to call it.
    """
    if input.numel() == 0:
        sums = counts = torch.zeros(shape, dtype=torch.float32, device=input.device)
    else:
        sums, counts = _sums_and_counts(input, scheme)
    sums, counts = sum_of_ranks(torch.stack([sums, counts])).unbind()
    return sums / counts


def _sums_and_counts(input: Tensor, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
    """Return the sums of |v| over what shares a scale, and how many values these are."""
    magnitudes = input.detach().abs().to(torch.float32)
    ones = torch.ones_like(magnitudes)
    return sum_per_scale(magnitudes, scheme), sum_per_scale(ones, scheme)
