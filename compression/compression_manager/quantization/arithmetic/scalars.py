"""The arithmetic of ranges on Python numbers, rounded as float32 rounds it.

Sums, products and quotients of two float32 numbers, computed in float64 and then rounded, are
what float32 arithmetic gives, because float64 has more than twice its digits. On the CPU this
takes a small part of the time of torch's operators on tensors of one element.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from compression_manager.quantization.arithmetic.parameters import MIN_SCALE
from compression_manager.quantization.scheme import QuantizationScheme

_FLOAT32 = struct.Struct("f")
_BITS = 8
# Beyond, sums and differences of two ends could exceed float32.
_LARGEST = torch.finfo(torch.float32).max / 4


def read(low: Tensor, high: Tensor) -> tuple[float, float] | None:
    """Return two limits as numbers; None unless both are small enough and at hand.

    At hand is one number on the CPU, outside of torch.compile.
    """
    if torch.compiler.is_compiling():
        return None
    for limit in (low, high):
        if type(limit) is not Tensor or limit.dim() > 0 or not limit.is_cpu:
            return None
    numbers = float(low), float(high)
    return numbers if fit(*numbers) else None


def fit(low: float, high: float) -> bool:
    """Return whether two ends are finite, and no sum or difference of such exceeds float32."""
    return abs(low) < _LARGEST and abs(high) < _LARGEST  # not so if one is not a number


def serve(scheme: QuantizationScheme) -> bool:
    """Return whether `affine_qparams` computes the numbers of `scheme`."""
    return not scheme.symmetric and scheme.bits <= _BITS


def float32(value: float) -> float:
    """Return the finite `value` rounded to float32, half to even."""
    rounded: float = _FLOAT32.unpack(_FLOAT32.pack(value))[0]
    return rounded


def moving_average(kept: float, batch: float, constant: float) -> float:
    """Return kept + constant * (batch - kept), with the constant rounded to float32 as well."""
    return float32(kept + float32(float32(constant) * float32(batch - kept)))


def affine_qparams(minimum: float, maximum: float, scheme: QuantizationScheme) -> tuple[float, int]:
    """Return what `compute_qparams` does for one range and an affine scheme of 8 bits.

    Args:
        minimum: a float32 number.
        maximum: a float32 number, not below; both `fit`, so that no integer stands for more than
            float32's maximum, which would cut the scale.
        scheme: affine, with at most 8 bits.
    """
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    half_extent = float32(float32(high * 0.5) - float32(low * 0.5))
    quant_min, quant_max = scheme.quant_min, scheme.quant_max
    scale = float32(half_extent / ((quant_max - quant_min) / 2))
    scale = max(scale, MIN_SCALE)
    zero_point = quant_min - round(float32(low / scale))
    return scale, min(max(zero_point, quant_min), quant_max)
