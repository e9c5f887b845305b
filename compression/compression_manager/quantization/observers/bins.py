"""Histograms whose bins nest: growing them moves whole counts and loses none.

The width of a bin is a power of two and its edges are multiples of the width. Of all such
layouts the finest is taken whose bins cover the smallest value, the largest value and zero. A
layout is thus a function of the range alone, every bin of a finer one lies inside of one bin of
a coarser one, and the counts are a function of the values that were seen: their order, and how
they were divided into batches or observers, changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compression_manager.quantization.observers.rows import Rows

# Widths below it, or their inverse above, would not be normal float32 numbers.
MIN_EXPONENT = -126

_BEYOND_ALL_BINS = 2.0**30


class Layout(NamedTuple):
    """Where the bins of each row lie.

    Attributes:
        exponent: int32 (rows,); bins are 2^exponent wide.
        first: int64 (rows,); the first bin starts at first * 2^exponent.
    """

    exponent: Tensor
    first: Tensor

    def width(self) -> Tensor:
        """Return the width of the bins: float32, (rows,)."""
        return _power_of_two(self.exponent)


def make_layout(minimum: Tensor, maximum: Tensor, bins: int) -> Layout:
    """Return the finest layout that covers a range and zero.

    Its width is below 2 * extent / (bins - 1), where the extent includes zero.

    Args:
        minimum: smallest values, float32 (rows,), finite.
        maximum: largest values, as `minimum`.
        bins: at least 128, so that the widest float32 range has a layout.
    """
    low, high = minimum.clamp(max=0.0), maximum.clamp(min=0.0)
    # Halved, because the whole extent may exceed float32.
    half_extent = high * 0.5 - low * 0.5
    start = torch.frexp(half_extent)[1] - (bins - 1).bit_length()
    start = start.clamp(min=MIN_EXPONENT)
    # 2^(start + 2) fits every range of this extent, 2^start only one whose extent was rounded up.
    exponent = start + 2
    for finer in (start + 1, start):
        fits = _multiples(high, finer) - _multiples(low, finer) < bins
        exponent = torch.where(fits, finer, exponent)
    exponent = torch.where(half_extent > 0, exponent, MIN_EXPONENT)
    return Layout(exponent, _multiples(low, exponent).to(torch.int64))


def rebin(counts: Tensor, old: Layout, new: Layout) -> Tensor:
    """Return `counts` (rows, bins) of layout `old` in a layout that covers it."""
    shift = (new.exponent - old.exponent).clamp(min=0, max=31).to(torch.int64).unsqueeze(1)
    position = torch.arange(counts.shape[1], device=counts.device)
    target = ((old.first.unsqueeze(1) + position) >> shift) - new.first.unsqueeze(1)
    # Only bins that were never filled may lie outside of the new ones.
    target = target.clamp(0, counts.shape[1] - 1)
    return _add(torch.zeros_like(counts), target, counts)


def tally(counts: Tensor, rows: Rows, layout: Layout, valid: Tensor) -> None:
    """Add the values of `rows` to `counts` (int64 (rows, bins)) in place, if `valid` (bool ())."""
    values = torch.where(valid, rows.values, 0.0)
    index = _multiples(values, layout.exponent.unsqueeze(1)).sub_(layout.first.unsqueeze(1))
    is_value = rows.is_value()
    amounts = valid if is_value is None else valid & is_value
    _add(counts, index.to(torch.int64), amounts.to(torch.int64).expand_as(values))


def fold(counts: Tensor, layout: Layout) -> Tensor:
    """Return the counts (rows, bins) of absolute values; bin i starts at i * width.

    A negative value on an edge counts to the bin below that edge's absolute value.
    """
    bins = counts.shape[1]
    position = torch.arange(bins, device=counts.device)
    folded = torch.zeros_like(counts)
    for source in (position - layout.first.unsqueeze(1), -1 - position - layout.first.unsqueeze(1)):
        inside = (source >= 0) & (source < bins)
        folded += torch.where(inside, counts.gather(1, source.clamp(0, bins - 1)), 0)
    return folded


def _multiples(values: Tensor, exponent: Tensor) -> Tensor:
    """Return floor(values / 2^exponent) as float32."""
    floor = (values * _power_of_two(-exponent)).floor_()
    # A product that underflows to -0 still belongs below zero. (`where` takes ten times as long.)
    highest = torch.sign(values).mul_(_BEYOND_ALL_BINS).clamp_(min=-1.0)
    return torch.minimum(floor, highest)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent for int32 from -126 to 127: exact on every device, unlike `exp2`."""
    return ((exponent + 127) << 23).view(torch.float32)


def _add(counts: Tensor, index: Tensor, amounts: Tensor) -> Tensor:
    """Add `amounts` at `index` (rows, n) of each row of `counts`, in place."""
    rows, bins = counts.shape
    if rows > 1:
        index = index + torch.arange(rows, device=index.device).unsqueeze(1) * bins
    # Flat, because torch has a deterministic CUDA kernel for one dimension only.
    counts.view(-1).scatter_add_(0, index.reshape(-1), amounts.reshape(-1))
    return counts
