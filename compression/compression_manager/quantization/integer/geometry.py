"""What an integer product needs to know of a layer's shape."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from torch import Tensor, nn

from compression_manager.quantization.integer.rule import Size


class Geometry(NamedTuple):
    """How a convolution moves over its input, along each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


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
    kernel = convolution.kernel_size
    rows = input.shape[0]
    for axis in range(len(kernel)):
        reach = geometry.dilation[axis] * (kernel[axis] - 1) + 1
        padded = input.shape[2 + axis] + 2 * geometry.padding[axis]
        rows *= (padded - reach) // geometry.stride[axis] + 1
    summed = convolution.in_channels // geometry.groups * math.prod(kernel)
    return Size(rows, summed, convolution.out_channels, geometry.groups)
