"""Quantization-aware convolutions and transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization.integer.rule import Decision
from compression_manager.quantization.layers.base import Operand, SinglePartLayer
from compression_manager.quantization.layers.decisions import remember
from compression_manager.quantization.layers.products import convolve

_TRANSPOSED = Decision("fake", "transposed convolutions have no product of integers")


class _QuantizedConv(SinglePartLayer):
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the fake-quantized input; shapes as the float layer."""
        layer = cast(nn.Conv2d, self)
        return convolve(layer, self.part(), self.product_options, input)


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """`nn.Conv1d` on fake-quantized operands; input (N, C, L) or (C, L)."""

    float_class = nn.Conv1d


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """`nn.Conv2d` on fake-quantized operands; input (N, C, H, W) or (C, H, W)."""

    float_class = nn.Conv2d


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """`nn.Conv3d` on fake-quantized operands; input (N, C, D, H, W) or (C, D, H, W)."""

    float_class = nn.Conv3d


def swap_channel_axes(weight: Tensor, groups: int) -> Tensor:
    """Return a transposed convolution's weight in the layout of a convolution, or the reverse.

    Args:
        weight: (in, out / groups, *kernel), where group g of the inputs feeds group g of the
            outputs; or (out, in / groups, *kernel).
        groups: number of groups.

    Returns:
        (out, in / groups, *kernel); or (in, out / groups, *kernel).
    """
    if groups == 1:
        return weight.transpose(0, 1)
    per_group = weight.shape[0] // groups
    grouped = weight.reshape(groups, per_group, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


class _QuantizedConvTranspose(SinglePartLayer):
    bias: Tensor | None
    groups: int
    _operation: Callable[..., Tensor]

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return the weight as (out, in / groups, *kernel)."""
        weight = swap_channel_axes(cast(Tensor, layer.weight), cast(int, layer.groups))
        return {"": Operand(weight, cast(Tensor | None, layer.bias))}

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution of the fake-quantized input.

        Args:
            input: as the float layer's.
            output_size: the spatial size wanted, where the stride leaves several possible.
        """
        layer = cast(nn.ConvTranspose2d, self)
        if self.product_options.forward != "fake" and not torch.compiler.is_compiling():
            remember(self.part(), _TRANSPOSED)
        return type(self)._operation(
            self.quantized_input(input),
            swap_channel_axes(self.quantized_weight(), self.groups),
            self.bias,
            layer.stride,
            layer.padding,
            find_output_padding(layer, input, output_size),
            self.groups,
            layer.dilation,
        )


def find_output_padding(
    layer: nn.Module, input: Tensor, output_size: list[int] | None
) -> list[int]:
    """Return what to add on one side of each spatial dimension, as torch's layers do.

    Args:
        layer: has the attributes of a transposed convolution.
        input: (N, C, *spatial) or (C, *spatial).
        output_size: spatial size of the output, or None for the layer's own output_padding.

    Raises:
        ValueError: the stride does not allow `output_size`.
    """
    shape: Any = cast(nn.ConvTranspose2d, layer)
    compute = cast(Callable[..., list[int]], nn.ConvTranspose2d._output_padding)
    return compute(
        shape,
        input,
        output_size,
        shape.stride,
        shape.padding,
        shape.kernel_size,
        len(shape.kernel_size),
        shape.dilation,
    )


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on fake-quantized operands; input (N, C, L) or (C, L)."""

    float_class = nn.ConvTranspose1d
    _operation = staticmethod(F.conv_transpose1d)


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on fake-quantized operands; input (N, C, H, W) or (C, H, W)."""

    float_class = nn.ConvTranspose2d
    _operation = staticmethod(F.conv_transpose2d)


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` on fake-quantized operands; input (N, C, D, H, W) or (C, D, H, W)."""

    float_class = nn.ConvTranspose3d
    _operation = staticmethod(F.conv_transpose3d)
