"""Deployed layers: integer weights, and the arithmetic that training computed.

A layer is built from the float layer that it replaces, which gives stride, padding and the
like, and from a `LayerSpec`, which says what the file holds. Its tensors are buffers, so that
a state_dict saves and restores it exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.deploy.layers.lazy_weight import LazyWeight
from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic.parameters import (
    QuantizationParameters,
    zero_point_dtype,
)
from compression_manager.quantization.arithmetic.rounding import fake_quantize
from compression_manager.quantization.quantizers.dynamic_quantizer import fake_quantize_dynamically
from compression_manager.quantization.quantizers.precision import Float32Buffers
from compression_manager.quantization.storage.weight import SCALE, WeightFormat


class ConvertedLayer(Float32Buffers):
    """Base of the deployed layers.

    Casts of the model, such as `.bfloat16()`, leave the scales as they are: integers of another
    grid would be other numbers.

    Attributes:
        weight_format: how the integers are stored, and the shape that `stored_form` gives the
            weight: (output channels, ...).
        weight: in floating point, as the float layer's: models ask for its dtype, or compute with
            it. Dequantized when its values are read; writing to them changes nothing. Under the
            same name a state_dict holds the integers in the shape of `weight_format`; below 8 bits
            uint8 (bytes,), as `pack_bits` packs them.
        weight_scale: float32, (), (channels,) or (rows, groups).
        weight_zero_point: the scheme's `storage_dtype`, same shape; of affine schemes only.
        input_scale: float32 (); absent in a weight-only layer and with a dynamic input.
        input_zero_point: int32 (); present with `input_scale`.
        bias: float, or None.
    """

    weight_format: WeightFormat
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    bias: Tensor | None
    _dtype = torch.float32

    def __init__(self, float_layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        # The model's own code may ask a layer for its in_features or embedding_dim.
        for name in cast(list[str], getattr(float_layer, "__constants__", ())):
            setattr(self, name, getattr(float_layer, name))
        float_weight = self.stored_form(float_layer)
        device, self._dtype = float_weight.device, float_weight.dtype
        self._float_shape = cast(Tensor, float_layer.weight).shape
        assert spec.weight is not None
        self.weight_format = WeightFormat(spec.weight, tuple(float_weight.shape))
        placeholders = self.weight_format.placeholders(device)
        for suffix in self.weight_format.value_suffixes():
            self.register_buffer("weight" + suffix, placeholders[suffix])
        self._add_input_buffers(device)
        float_bias = getattr(float_layer, "bias", None)
        length = float_weight.shape[:1] if float_bias is None else float_bias.shape
        bias = torch.zeros(length, dtype=float_weight.dtype, device=device)
        self.register_buffer("bias", bias if spec.bias else None)
        self.train(False)

    def _add_input_buffers(self, device: torch.device) -> None:
        scheme = self.spec.input
        if scheme is None or scheme.dynamic:
            return
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=device))
        zero_point = torch.zeros((), dtype=zero_point_dtype(scheme), device=device)
        self.register_buffer("input_zero_point", zero_point)

    @property
    def weight(self) -> Tensor:
        """Return the weight as the float layer has it, dequantized when its values are read."""
        if "weight" not in self._buffers:
            raise AttributeError  # nn.Module then says so, as of every attribute
        if torch.compiler.is_dynamo_compiling():
            return self.dequantized()  # what is not used, it removes
        device = self.weight_scale.device
        return LazyWeight(self, self._float_shape, self._dtype, device)

    def _stays_float32(self, name: str) -> bool:
        return name.endswith(SCALE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return super()._apply(fn, recurse)

    def dequantized(self) -> Tensor:
        """Return the weight as the float layer has it: its shape, in floating point."""
        return self.float_form(self.float_weight(self._dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor) and value.is_floating_point():
            raise QuantizationError(
                f"the weight of a deployed {self.spec.kind} is stored as integers and cannot be "
                "replaced by floating-point numbers; set it in the trained model and convert that."
            )
        super().__setattr__(name, value)

    def stored_form(self, float_layer: nn.Module) -> Tensor:
        """Return the weight of the float layer with its output channels in dimension 0."""
        return cast(Tensor, float_layer.weight)

    def float_form(self, weight: Tensor) -> Tensor:
        """Return a weight in the shape of `stored_form` in that of the float layer."""
        return weight

    @torch.no_grad()
    def fill(
        self,
        weight: Tensor,
        weight_parameters: QuantizationParameters,
        input_parameters: QuantizationParameters | None,
        bias: Tensor | None,
    ) -> None:
        """Quantize `weight` (float, finite) and copy everything into the buffers.

        Raises:
            QuantizationError: a zero point that the weight's scheme does not have.
        """
        scale, zero_point = weight_parameters.scale, weight_parameters.zero_point
        encoded = self.weight_format.encode(weight, scale, zero_point)
        for suffix, tensor in self.weight_tensors().items():
            tensor.copy_(encoded[suffix])
        self.fill_input(input_parameters)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def fill_input(self, parameters: QuantizationParameters | None) -> None:
        """Copy the input's numbers into the buffers; None if there are none."""
        if parameters is not None:
            self.input_scale.copy_(parameters.scale)
            self.input_zero_point.copy_(parameters.zero_point)

    def share_weight(self, other: ConvertedLayer) -> None:
        """Hold the very tensors of `other` if weight, scale and zero point equal its own."""
        if self.weight_format != other.weight_format:
            return
        own, others = self.weight_tensors(), other.weight_tensors()
        if all(torch.equal(own[suffix], tensor) for suffix, tensor in others.items()):
            for suffix, tensor in others.items():
                setattr(self, "weight" + suffix, tensor)

    def weight_tensors(self) -> dict[str, Tensor]:
        """Return the buffers that stand for the weight, by what their names add to `weight`."""
        suffixes = self.weight_format.value_suffixes()
        return {suffix: cast(Tensor, self._buffers["weight" + suffix]) for suffix in suffixes}

    def quantized_input(self, input: Tensor) -> Tensor:
        """Return the input on its quantization grid, in its own dtype."""
        scheme = self.spec.input
        if scheme is None:
            return input
        if scheme.dynamic:
            return fake_quantize_dynamically(input, scheme)
        return fake_quantize(
            input, self.input_scale, self.input_zero_point, scheme.quant_min, scheme.quant_max
        )

    def check_input(self, input: Tensor) -> None:
        """Refuse an input that is not floating-point.

        Raises:
            QuantizationError: it is not.
        """
        if not input.is_floating_point():
            raise QuantizationError(
                f"a deployed {self.spec.kind} got an input of {input.dtype}; it takes floating "
                "point, as the float layer does."
            )

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight."""
        return self.weight_format.decode(self.weight_tensors(), dtype)

    def integer_weight(self) -> Tensor:
        """Return the integers one by one, in the shape that `stored_form` gives the weight."""
        return self.weight_format.integers(self.weight_tensors())

    def extra_repr(self) -> str:
        """Return the schemes, for printing."""
        return f"weight={self.spec.weight or 'none'}, input={self.spec.input or 'float'}"
