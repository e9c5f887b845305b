"""Deployed `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.deploy.layers import products
from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.layer_spec import LayerSpec

_CONVOLUTIONS: dict[str, Any] = {"Conv1d": F.conv1d, "Conv2d": F.conv2d, "Conv3d": F.conv3d}


class ConvertedConv(ConvertedLayer):
    """Deployed `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`; shapes as the float layer."""

    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(self, float_layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__(float_layer, spec)
        # torch's own padding of the borders for the modes that are not zeros.
        self._border = list(cast(nn.Conv2d, float_layer)._reversed_padding_repeated_twice)
        self._convolve = _CONVOLUTIONS[spec.kind]

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution."""
        self.check_input(input)
        integers = products.convolve(self, input)
        if integers is not None:
            return integers
        quantized = self.quantized_input(input)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            quantized = F.pad(quantized, self._border, mode=self.padding_mode)
            padding = 0
        output: Tensor = self._convolve(
            quantized,
            self.float_weight(input.dtype),
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
        return output
