"""The range whose quantized distribution diverges least from the observed one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.quantization.observers.bins import Layout, fold
from compression_manager.quantization.scheme import QuantizationScheme

# Numbers that one block of candidates may take, so that memory stays bounded.
_BLOCK = 1 << 20


def least_divergence_range(
    counts: Tensor, layout: Layout, minimum: Tensor, maximum: Tensor, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """Return the range of least Kullback-Leibler divergence.

    TensorRT's convention (Migacz, "8-bit Inference with TensorRT", GTC 2017), in the details that
    NVIDIA's pytorch-quantization fixed in `_compute_amax_entropy`: over the histogram of absolute
    values, a candidate i clips at the upper edge of bin i - 1. The reference P is the first i
    bins, with all that is clipped added to the last of them. Q divides the first i bins, without
    what is clipped, evenly into the positive levels of the scheme; the bins of one level that are
    not empty share its count equally. The candidate with the least KL(P || Q) wins, of equal ones
    the largest. The first bin takes the count of the second, because the zeros in it are
    represented exactly. Candidates start with as many bins as there are levels.

    Levels: 2^(bits - 1); for an affine scheme 2^bits where all values lie on one side of zero. As
    in onnxruntime, the range does not exceed the observed one.

    Args:
        counts: int64 (rows, bins).
        layout: where the bins lie.
        minimum, maximum: observed range, float32 (rows,).

    Returns:
        (minimum, maximum), float32 (rows,), with zero inside. Computed in float64.
    """
    low, high = minimum.clamp(max=0.0), maximum.clamp(min=0.0)
    sums = _Sums.of(fold(counts, layout))
    width = layout.width()
    # A positive value on an edge belongs to the bin above it, a negative one to the bin below.
    limit = torch.maximum(torch.floor(high / width) + 1, torch.ceil(-low / width))
    limit = limit.to(torch.int64).unsqueeze(1)
    levels = torch.full_like(limit, 1 << (scheme.bits - 1))
    most = 1 << scheme.bits
    if scheme.symmetric:
        most //= 2
    else:
        levels = torch.where(((low == 0) | (high == 0)).unsqueeze(1), most, levels)
    least = torch.full_like(limit, torch.inf, dtype=torch.float64)
    best = limit
    block = max(1, _BLOCK // (counts.shape[0] * (most + 1)))
    # Descending, so that the first of equal minima is the largest candidate.
    candidates = torch.arange(counts.shape[1], 1, -1, device=counts.device)
    for start in range(0, candidates.shape[0], block):
        part = candidates[start : start + block]
        found = _divergence(sums, part, levels, most)
        found = torch.where((part >= levels) & (part <= limit), found, torch.inf)
        index = found.argmin(1, keepdim=True)
        smallest = found.gather(1, index)
        best = torch.where(smallest < least, part[index], best)
        least = torch.minimum(least, smallest)
    clip = best.squeeze(1) * width
    return torch.maximum(-clip, low), torch.minimum(clip, high)


class _Sums(NamedTuple):
    """Sums over the first i bins of a histogram, (rows, bins + 1)."""

    counts: Tensor
    filled: Tensor
    count_log_count: Tensor

    @classmethod
    def of(cls, magnitudes: Tensor) -> _Sums:
        magnitudes = torch.cat([magnitudes[:, 1:2], magnitudes[:, 1:]], 1)
        counts = magnitudes.to(torch.float64)
        terms = (counts, (magnitudes > 0).to(torch.float64), torch.xlogy(counts, counts))
        return cls(*(_sums_before(term) for term in terms))


def _sums_before(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, ... n values of each row, (rows, n + 1).

    Not `cumsum`, which in floating point has no deterministic CUDA kernel. The order of these
    additions is the same on every device.
    """
    total, reach = F.pad(values, (1, 0)), 1
    while reach < total.shape[1]:
        total = total + F.pad(total[:, :-reach], (reach, 0))
        reach *= 2
    return total


def _divergence(sums: _Sums, candidates: Tensor, levels: Tensor, most: int) -> Tensor:
    """Return KL(P || Q) of each candidate: float64 (rows, candidates); infinite where Q lacks P.

    With P and Q constant on what they share, the sum over bins is one over levels of sums.
    """
    position = torch.arange(most + 1, device=candidates.device)
    number, share = candidates.unsqueeze(1), levels.unsqueeze(2)
    # Level l starts at the first bin that is not below l * candidate / levels.
    start = torch.div(position * number + share - 1, share, rounding_mode="floor")
    start = torch.minimum(start, number)
    in_level, filled = (_between(total, start) for total in (sums.counts, sums.filled))
    density = in_level / filled.clamp(min=1.0)
    cross = torch.xlogy(in_level, density).sum(2)
    last_level = (levels - 1).unsqueeze(2).expand(-1, candidates.shape[0], 1)
    last_density = density.gather(2, last_level).squeeze(2)
    inside, total = sums.counts[:, candidates], sums.counts[:, -1:]
    clipped, before = total - inside, sums.counts[:, candidates - 1]
    in_last = inside - before
    reference = sums.count_log_count[:, candidates - 1] + torch.xlogy(
        in_last + clipped, in_last + clipped
    )
    divergence = (reference - cross - torch.xlogy(clipped, last_density)) / total
    divergence = divergence + torch.log(inside / total)
    return torch.where((in_last > 0) | (clipped == 0), divergence, torch.inf).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )


def _between(total: Tensor, start: Tensor) -> Tensor:
    """Return the sums between neighbours of `start` (rows or 1, candidates, n + 1)."""
    rows, candidates = total.shape[0], start.shape[1]
    spread = total.unsqueeze(1).expand(rows, candidates, -1)
    return spread.gather(2, start.expand(rows, -1, -1)).diff(dim=2)
