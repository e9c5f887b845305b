"""What an integer product needs to know of a layer's shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def places(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Return the size of the result of an input and a kernel of these sizes."""
        return tuple(
            (length + 2 * padding - dilation * (extent - 1) - 1) // stride + 1
            for length, extent, stride, padding, dilation in zip(
                size, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )


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
    return None


def geometry_of(layer: nn.Module) -> Geometry:
    """Return the geometry of a convolution that `why_no_geometry` has nothing against."""
    convolution = cast(nn.Conv2d, layer)
    padding = cast(tuple[int, ...], convolution.padding)
    return Geometry(convolution.stride, padding, convolution.dilation, convolution.groups)


def convolution_size(layer: nn.Module, input: Tensor) -> Size:
    """Return the size of the matrix product that the convolution of `input` amounts to."""
    convolution, geometry = cast(nn.Conv2d, layer), geometry_of(layer)
    places = geometry.places(input.shape[2:], convolution.kernel_size)
    summed = convolution.in_channels // geometry.groups * math.prod(convolution.kernel_size)
    return Size(
        input.shape[0] * math.prod(places), summed, convolution.out_channels, geometry.groups
    )


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return what `F.conv1d`, `F.conv2d` or `F.conv3d` does, by the number of dimensions."""
    stride, padding, dilation, groups = geometry
    nothing = [0] * len(stride)
    return torch.convolution(input, weight, bias, stride, padding, dilation, False, nothing, groups)
