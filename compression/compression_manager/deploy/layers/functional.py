"""Deployed products and sums of two activations: no weight, and inputs with stored ranges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.deploy.layers import products
from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.composite import ConvertedComposite
from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.quantization.layers.base import QuantizedLayer
from compression_manager.quantization.layers.functional import (
    QuantizedAdd,
    QuantizedAttention,
    QuantizedMatmul,
)


class ConvertedInput(ConvertedLayer):
    """One input: `input_scale` and `input_zero_point`, both () and absent if dynamic."""

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        self._add_input_buffers(device)
        self.training = False

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` on its quantization grid."""
        return self.quantized_input(input)


class _ConvertedInputs(ConvertedComposite):
    """Base of the layers without weights; the inputs that are quantized are its children.

    Attributes:
        trained_class: the quantization-aware form, which names the inputs.
    """

    trained_class: ClassVar[type[QuantizedLayer]]

    def __init__(self, float_layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__(spec, {})
        # A float layer has no tensor that could tell the device.
        known = next(float_layer.buffers(), torch.empty(0))
        for name in self.trained_class.operands_of(float_layer):
            self.add_module(name, ConvertedInput(replace(spec, bias=False), known.device))

    def quantized(self, name: str, input: Tensor) -> Tensor:
        return cast(Tensor, self.get_submodule(name)(input))


class ConvertedMatmul(_ConvertedInputs):
    """Deployed `QuantizableMatmul`; its inputs are the children `left` and `right`."""

    trained_class = QuantizedMatmul

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left @ right."""
        return torch.matmul(self.quantized("left", left), self.quantized("right", right))


class ConvertedAdd(_ConvertedInputs):
    """Deployed `QuantizableAdd`; its child is `residual`."""

    trained_class = QuantizedAdd

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """Return input + residual."""
        total = products.add(cast(ConvertedLayer, self.residual), input, residual)
        return input + self.quantized("residual", residual) if total is None else total


class ConvertedAttention(_ConvertedInputs):
    """Deployed `QuantizableAttention`; its children are `query`, `key` and `value`."""

    trained_class = QuantizedAttention

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
    ) -> Tensor:
        """Return the attention; arguments as `QuantizableAttention`'s."""
        return F.scaled_dot_product_attention(
            self.quantized("query", query),
            self.quantized("key", key),
            self.quantized("value", value),
            *arguments,
            **options,
        )
