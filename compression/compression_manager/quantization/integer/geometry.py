"""What an integer product needs to know of a layer's shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """The size of a product: (rows, summed) times (summed, columns), in `groups` of columns."""

    rows: int
    summed: int
    columns: int
    groups: int = 1


class Geometry(NamedTuple):
    """How a convolution moves over its input, along each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def is_computed_by_onednn(
        self, size: Sequence[int | None], kernel: Sequence[int], depth: int
    ) -> bool:
        """Return whether oneDNN's 8-bit convolution (3.12) computes what it should.

        Where a window lies beside the input altogether, it returns garbage or ends the process;
        likewise, with one channel, where a tap of the kernel never meets the input.

        Args:
            size: of the input, (*spatial); None where it is open.
            kernel: its sizes, (*spatial).
            depth: channels that are summed.
        """
        axes = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return all(
            _always_meets(extent, padding, dilation, depth)
            if length is None
            else _meets_input(length, extent, stride, padding, dilation, depth)
            for length, extent, stride, padding, dilation in axes
        )

    def places(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Return the size of the result of an input and a kernel of these sizes."""
        axes = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(_places(*axis) for axis in axes)


def _places(length: int, extent: int, stride: int, padding: int, dilation: int) -> int:
    return (length + 2 * padding - dilation * (extent - 1) - 1) // stride + 1


def _always_meets(extent: int, padding: int, dilation: int, depth: int) -> bool:
    """Return what `_meets_input` does of an axis of any length."""
    return padding == 0 or (depth > 1 and dilation == 1 and padding < extent)


def _meets_input(
    length: int, extent: int, stride: int, padding: int, dilation: int, depth: int
) -> bool:
    """Return whether windows, and of one channel taps, meet the input along an axis."""
    axis = length, extent, stride, padding, dilation
    places = _places(*axis)
    return not (_has_empty_window(*axis, places) or (depth == 1 and _has_unused_tap(*axis, places)))


def _has_empty_window(
    length: int, extent: int, stride: int, padding: int, dilation: int, places: int
) -> bool:
    """Return whether a place along an axis reads nothing but padding."""
    # Windows that begin within the input read that element.
    before = range(min(-(-padding // stride), places))
    return any(
        not _meets(place * stride - padding, dilation, extent, length)
        for place in (*before, places - 1)
    )


def _has_unused_tap(
    length: int, extent: int, stride: int, padding: int, dilation: int, places: int
) -> bool:
    """Return whether an element of the kernel meets padding only, at all places along an axis."""
    return any(
        not _meets(tap * dilation - padding, stride, places, length) for tap in range(extent)
    )


def _meets(first: int, step: int, count: int, length: int) -> bool:
    """Return whether one of `count` numbers from `first` on is an index of `length` elements."""
    index = max(-(first // step), 0)
    return index < count and first + index * step < length


def linear_size(input: Tensor, weight_shape: tuple[int, ...]) -> Size:
    """Return the size of the product of `input` (*, summed) and a weight (columns, summed)."""
    columns, summed = weight_shape
    return Size(input.numel() // max(summed, 1), summed, columns)


def why_no_geometry(layer: nn.Module, input: Tensor) -> str | None:
    """Return why only torch's own functions compute a convolution; None if kernels can.

    Args:
        layer: has the attributes of a convolution, not transposed.
        input: its input.
    """
    convolution = cast(nn.Conv2d, layer)
    if not input.is_cpu:
        return "convolutions of integers are computed on the CPU only"
    if input.dim() != 2 + len(convolution.kernel_size):
        return "its input has no batch dimension"
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return (
            f"padding {convolution.padding!r} of mode '{convolution.padding_mode}' has no integer "
            "kernel"
        )
    return _why_no_windows(
        input.shape[2:],
        convolution.kernel_size,
        geometry_of(layer),
        convolution.in_channels // convolution.groups,
    )


@lru_cache(maxsize=256)
def _why_no_windows(
    size: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry, depth: int
) -> str | None:
    if geometry.is_computed_by_onednn(size, kernel, depth):
        return None
    return (
        f"a kernel of {kernel} that reads padding only, here and there on an input of "
        f"{tuple(size)}, is not computed right by oneDNN's 8-bit convolution"
    )


def geometry_of(layer: nn.Module) -> Geometry:
    """Return the geometry of a convolution that `why_no_geometry` has nothing against."""
    convolution = cast(nn.Conv2d, layer)
    padding = cast(tuple[int, ...], convolution.padding)
    return Geometry(convolution.stride, padding, convolution.dilation, convolution.groups)


def convolution_size(layer: nn.Module, input: Tensor) -> Size:
    """Return the size of the matrix product that the convolution of `input` amounts to."""
    convolution = cast(nn.Conv2d, layer)
    channels = convolution.in_channels, convolution.out_channels
    return _size_of(input.shape, convolution.kernel_size, geometry_of(layer), *channels)


@lru_cache(maxsize=256)
def _size_of(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    geometry: Geometry,
    in_channels: int,
    out_channels: int,
) -> Size:
    rows = shape[0] * math.prod(geometry.places(shape[2:], kernel))
    summed = in_channels // geometry.groups * math.prod(kernel)
    return Size(rows, summed, out_channels, geometry.groups)


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return what `F.conv1d`, `F.conv2d` or `F.conv3d` does, by the number of dimensions."""
    stride, padding, dilation, groups = geometry
    nothing = [0] * len(stride)
    return torch.convolution(input, weight, bias, stride, padding, dilation, False, nothing, groups)
