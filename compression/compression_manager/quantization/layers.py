"""Quantization-aware layers: subclasses that a supported layer turns into, in place.

Changing the class keeps the module object, its Parameters, names, hooks and `isinstance`
relations, so that optimizers, taps and the model's own control flow stay valid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization.quantizer_module import FakeQuantizer


class QuantizedLayer(nn.Module):
    """Mixin of all quantization-aware layers.

    Attributes:
        weight_quantizer: fake-quantizes the weight in every forward pass.
        input_quantizer: fake-quantizes the input, or None for weight-only layers.
    """

    float_class: type[nn.Module]
    weight: Tensor
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | None

    def quantized_weight(self) -> Tensor:
        """Return the fake-quantized weight; shape and dtype of `weight`."""
        return cast(Tensor, self.weight_quantizer(self.weight))

    def quantized_input(self, input: Tensor) -> Tensor:
        """Return the fake-quantized input, or the input itself in a weight-only layer."""
        if self.input_quantizer is None:
            return input
        return cast(Tensor, self.input_quantizer(input))

    def quantizers(self) -> list[FakeQuantizer]:
        """Return the layer's fake quantizers."""
        own = (self.weight_quantizer, self.input_quantizer)
        return [quantizer for quantizer in own if quantizer is not None]


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` on fake-quantized operands; input (*, in_features)."""

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, out_features)."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class _QuantizedConv(QuantizedLayer):
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the fake-quantized input; shapes as the float layer."""
        convolve = cast(Callable[..., Tensor], self._conv_forward)
        return convolve(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """`nn.Conv1d` on fake-quantized operands; input (N, C, L) or (C, L)."""

    float_class = nn.Conv1d


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """`nn.Conv2d` on fake-quantized operands; input (N, C, H, W) or (C, H, W)."""

    float_class = nn.Conv2d


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """`nn.Conv3d` on fake-quantized operands; input (N, C, D, H, W) or (C, D, H, W)."""

    float_class = nn.Conv3d


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """`nn.Embedding` with a fake-quantized table; input: integer indices of any shape."""

    float_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, embedding_dim)."""
        return F.embedding(
            input,
            self.quantized_weight(),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    quantized.float_class: quantized
    for quantized in (
        QuantizedLinear,
        QuantizedConv1d,
        QuantizedConv2d,
        QuantizedConv3d,
        QuantizedEmbedding,
    )
}


def quantize_layer(
    layer: nn.Module, weight_quantizer: FakeQuantizer, input_quantizer: FakeQuantizer | None
) -> QuantizedLayer:
    """Turn `layer`, whose exact class is supported, into its quantization-aware subclass."""
    layer.__class__ = QUANTIZED_CLASSES[type(layer)]
    layer.add_module("weight_quantizer", weight_quantizer)
    layer.add_module("input_quantizer", input_quantizer)
    return cast(QuantizedLayer, layer)


def restore_layer(layer: QuantizedLayer) -> None:
    """Turn the layer back into the float layer that it was."""
    del layer.weight_quantizer
    del layer.input_quantizer
    layer.__class__ = layer.float_class  # type: ignore[assignment]  # mypy allows no class change
