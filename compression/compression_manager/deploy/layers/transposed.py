"""Deployed layers whose float weight has its input channels in dimension 0.

Their integers are stored with the output channels first, as those of all other layers.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.deploy.layers.linear import ConvertedLinear
from compression_manager.quantization.layers.convolution import (
    find_output_padding,
    swap_channel_axes,
)

_OPERATIONS: dict[int, Any] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class ConvertedConvTranspose(ConvertedLayer):
    """Deployed `nn.ConvTranspose1d`, `2d` or `3d`; shapes as the float layer.

    The integers are (out, in / groups, *kernel).
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    kernel_size: tuple[int, ...]

    def stored_form(self, float_layer: nn.Module) -> Tensor:
        """Return (out, in / groups, *kernel)."""
        return swap_channel_axes(cast(Tensor, float_layer.weight), cast(int, float_layer.groups))

    def float_form(self, weight: Tensor) -> Tensor:
        """Return (in, out / groups, *kernel) of (out, in / groups, *kernel)."""
        return swap_channel_axes(weight, self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution; arguments as the float layer's."""
        self.check_input(input)
        output: Tensor = _OPERATIONS[len(self.kernel_size)](
            self.quantized_input(input),
            self.float_form(self.float_weight(input.dtype)),
            self.bias,
            self.stride,
            self.padding,
            find_output_padding(self, input, output_size),
            self.groups,
            self.dilation,
        )
        return output


class ConvertedConv1D(ConvertedLinear):
    """Deployed `Conv1D` of transformers; the integers are (outputs, inputs)."""

    def __init__(self, float_layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__(float_layer, spec)
        self.nf, self.nx = self.weight_format.shape

    def stored_form(self, float_layer: nn.Module) -> Tensor:
        """Return (outputs, inputs)."""
        return cast(Tensor, float_layer.weight).t()

    def float_form(self, weight: Tensor) -> Tensor:
        """Return (inputs, outputs) of (outputs, inputs)."""
        return weight.t()

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, outputs) of `x`: (*, inputs)."""
        return super().forward(x)
