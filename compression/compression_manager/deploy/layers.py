"""Deployed layers: integer weights, and the arithmetic that training computed.

A layer is built from the float layer that it replaces, which gives stride, padding and the
like, and from a `LayerSpec`, which says what the file holds. Its tensors are buffers, so that
a state_dict saves and restores it exactly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization.arithmetic import dequantize, fake_quantize, quantize
from compression_manager.quantization.dynamic_quantizer import fake_quantize_dynamically
from compression_manager.quantization.parameters import QuantizationParameters, zero_point_dtype
from compression_manager.quantization.ranges import range_shape
from compression_manager.quantization.scheme import QuantizationScheme


@dataclass(frozen=True)
class LayerSpec:
    """What must be known of a deployed layer besides its tensors; JSON-able.

    Attributes:
        kind: class name of the float layer, for example `Linear`.
        weight: scheme of all its weights, or None if it has none.
        input: scheme of all its inputs, or None if they stay in floating point.
        bias: whether the deployed layer adds a bias (folding BatchNorm creates one).
    """

    kind: str
    weight: QuantizationScheme | None
    input: QuantizationScheme | None
    bias: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `from_dict` takes them back."""
        return {
            **asdict(self),
            "weight": None if self.weight is None else self.weight.to_dict(),
            "input": None if self.input is None else self.input.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSpec:
        """Return the spec that `to_dict` described."""
        return cls(
            kind=values["kind"],
            weight=_scheme_or_none(values["weight"]),
            input=_scheme_or_none(values["input"]),
            bias=values["bias"],
        )


def _scheme_or_none(values: dict[str, Any] | None) -> QuantizationScheme | None:
    return None if values is None else QuantizationScheme.from_dict(values)


class ConvertedLayer(nn.Module):
    """Base of the deployed layers.

    Attributes:
        weight: integers, (output channels, ...): the shape that `stored_form` gives the weight.
        weight_scale: float32, (), (channels,) or (rows, groups).
        weight_zero_point: int32 (int64 above 24 bits), same shape.
        input_scale: float32 (); absent in a weight-only layer and with a dynamic input.
        input_zero_point: int32 (); present with `input_scale`.
        bias: float, or None.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, float_layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        # The model's own code may ask a layer for its in_features or embedding_dim.
        for name in cast(list[str], getattr(float_layer, "__constants__", ())):
            setattr(self, name, getattr(float_layer, name))
        float_weight = self.stored_form(float_layer)
        device = float_weight.device
        scheme = self.weight_scheme
        scales = range_shape(scheme, float_weight.shape)
        integers = torch.zeros(float_weight.shape, dtype=scheme.storage_dtype, device=device)
        self.register_buffer("weight", integers)
        self.register_buffer("weight_scale", torch.ones(scales, device=device))
        self.register_buffer(
            "weight_zero_point",
            torch.zeros(scales, dtype=zero_point_dtype(scheme), device=device),
        )
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
        self.register_buffer("input_scale", torch.ones((), device=device))
        zero_point = torch.zeros((), dtype=zero_point_dtype(scheme), device=device)
        self.register_buffer("input_zero_point", zero_point)

    @property
    def weight_scheme(self) -> QuantizationScheme:
        """Scheme of the weight, for layers that have one."""
        assert self.spec.weight is not None
        return self.spec.weight

    def stored_form(self, float_layer: nn.Module) -> Tensor:
        """Return the weight of the float layer with its output channels in dimension 0."""
        return cast(Tensor, float_layer.weight)

    @torch.no_grad()
    def fill(
        self,
        weight: Tensor,
        weight_parameters: QuantizationParameters,
        input_parameters: QuantizationParameters | None,
        bias: Tensor | None,
    ) -> None:
        """Quantize `weight` (float) and copy everything into the buffers."""
        scale, zero_point = weight_parameters.scale, weight_parameters.zero_point
        self.weight.copy_(
            quantize(
                weight,
                scale,
                zero_point,
                weight_parameters.quant_min,
                weight_parameters.quant_max,
                weight_parameters.axis,
                group_size=weight_parameters.group_size,
            )
        )
        self.weight_scale.copy_(scale)
        self.weight_zero_point.copy_(zero_point)
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
        names = ("weight", "weight_scale", "weight_zero_point")
        if all(torch.equal(getattr(self, name), getattr(other, name)) for name in names):
            for name in names:
                setattr(self, name, getattr(other, name))

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

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight."""
        return dequantize(
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.weight_scheme.axis,
            dtype=dtype,
            group_size=self.weight_scheme.group_size,
        )

    def extra_repr(self) -> str:
        """Return the schemes, for printing."""
        return f"weight={self.spec.weight or 'none'}, input={self.spec.input or 'float'}"


class ConvertedLinear(ConvertedLayer):
    """Deployed `nn.Linear`; input (*, in_features)."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, out_features)."""
        return F.linear(self.quantized_input(input), self.float_weight(input.dtype), self.bias)


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


class ConvertedEmbedding(ConvertedLayer):
    """Deployed `nn.Embedding`; dequantizes only the rows that are looked up."""

    def __init__(self, float_layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__(float_layer, spec)
        self._dtype = cast(Tensor, float_layer.weight).dtype

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, embedding_dim) for integer indices of any shape."""
        rows = self.weight[input.reshape(-1)]
        scale, zero_point = self.weight_scale, self.weight_zero_point
        axis, group_size = self.weight_scheme.axis, self.weight_scheme.group_size
        if group_size is not None or (axis is not None and axis % self.weight.dim() == 0):
            scale, zero_point = scale[input.reshape(-1)], zero_point[input.reshape(-1)]
        values = dequantize(rows, scale, zero_point, axis, dtype=self._dtype, group_size=group_size)
        return values.reshape(*input.shape, self.weight.shape[1])


_CONVOLUTIONS: dict[str, Any] = {"Conv1d": F.conv1d, "Conv2d": F.conv2d, "Conv3d": F.conv3d}
