"""Exact sums of products of integers, by the float32 kernels that every CPU has.

float32 holds every integer up to 2^24. So many terms that no sum of them exceeds that are summed
without an error, in any order and by any kernel; further terms are added in 32-bit integers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from compression_manager.quantization.integer.geometry import Geometry, convolution

# Products of a code up to 255 and a weight down to -128 that sum up to 2^24 at most.
MOST_TERMS = 2**24 // (255 * 128)


def product(codes: Tensor, zero_point: int, weight: Tensor) -> Tensor:
    """Return (codes - zero_point) @ weight.T, rounded to float32 once.

    Args:
        codes: uint8 (M, K), on the CPU.
        zero_point: integer of real zero in `codes`.
        weight: int8 (N, K).

    Returns:
        float32 (M, N), contiguous, a tensor of its own.
    """
    sums = [
        some.to(torch.float32).sub_(zero_point) @ rows.to(torch.float32).t()
        for some, rows in zip(codes.split(MOST_TERMS, 1), weight.split(MOST_TERMS, 1), strict=True)
    ]
    return _total(sums)


def convolve(codes: Tensor, zero_point: int, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the convolution of codes - zero_point and weight, rounded to float32 once.

    Args:
        codes: uint8 (N, C, *spatial), on the CPU.
        zero_point: integer of real zero in `codes`.
        weight: int8 (out channels, C / groups, *kernel).
        geometry: any.
    """
    terms = weight[0, 0].numel()
    channels = weight.shape[1] if geometry.groups > 1 else MOST_TERMS // terms
    if channels == 0 or channels * terms > MOST_TERMS:
        return _total([_convolved(codes, weight, zero_point, geometry, torch.float64)])
    # Those of all groups stay together.
    pieces = zip(codes.split(channels * geometry.groups, 1), weight.split(channels, 1), strict=True)
    with _without_transforms():
        return _total([_convolved(*piece, zero_point, geometry, torch.float32) for piece in pieces])


def _without_transforms() -> AbstractContextManager[object]:
    """Switch off the kernels that torch may take without oneDNN and that transform operands first.

    Such transforms round.
    """
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return nullcontext() if has_onednn else torch.backends.nnpack.flags(enabled=False)


def _convolved(
    codes: Tensor, weight: Tensor, zero_point: int, geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    numbers = codes.to(dtype).sub_(zero_point)
    return convolution(numbers, weight.to(dtype), None, geometry)


def _total(sums: list[Tensor]) -> Tensor:
    if len(sums) == 1:
        return sums[0].to(torch.float32).add_(0.0)  # 0 * -1 is -0.0, which no integer is
    total = sums[0].to(torch.int32)
    for part in sums[1:]:
        total.add_(part.to(torch.int32))
    return total.to(torch.float32)
