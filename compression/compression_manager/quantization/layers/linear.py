"""Quantization-aware fully connected layers."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from compression_manager.quantization.layers.base import Operand, SinglePartLayer
from compression_manager.quantization.layers.products import linear


class QuantizedLinear(SinglePartLayer, nn.Linear):
    """`nn.Linear` on fake-quantized operands; input (*, in_features)."""

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, out_features)."""
        return linear(self.part(), self.product_options, input)


class QuantizedOutputProjection(SinglePartLayer, NonDynamicallyQuantizableLinear):
    """The last projection of `nn.MultiheadAttention`, whose quantized form calls it."""

    float_class = NonDynamicallyQuantizableLinear

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, out_features)."""
        return linear(self.part(), self.product_options, input)


class QuantizedConv1D(SinglePartLayer):
    """The Linear of transformers' GPT-2, `Conv1D`, whose weight is (inputs, outputs).

    The base of a class that also inherits from `Conv1D` itself, which is made when the first
    such layer appears, so that transformers need not be installed. Input (*, inputs).
    """

    bias: Tensor

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return the weight as (outputs, inputs)."""
        return {"": Operand(cast(Tensor, layer.weight).t(), cast(Tensor, layer.bias))}

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, outputs)."""
        return linear(self.part(), self.product_options, x)
