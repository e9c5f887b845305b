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
from compression_manager.quantization.parameters import QuantizationParameters
from compression_manager.quantization.scheme import MAX_FLOAT32_BITS, QuantizationScheme


@dataclass(frozen=True)
class LayerSpec:
    """What must be known of a deployed layer besides its tensors; JSON-able.

    Attributes:
        kind: class name of the float layer, for example `Linear`.
        weight: scheme of the weight.
        input: scheme of the input, or None for a weight-only layer.
        bias: whether the deployed layer adds a bias (folding BatchNorm creates one).
    """

    kind: str
    weight: QuantizationScheme
    input: QuantizationScheme | None
    bias: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `from_dict` takes them back."""
        return {
            **asdict(self),
            "weight": self.weight.to_dict(),
            "input": None if self.input is None else self.input.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSpec:
        """Return the spec that `to_dict` described."""
        return cls(
            kind=values["kind"],
            weight=QuantizationScheme.from_dict(values["weight"]),
            input=None
            if values["input"] is None
            else QuantizationScheme.from_dict(values["input"]),
            bias=values["bias"],
        )


class ConvertedLayer(nn.Module):
    """Base of the deployed layers.

    Attributes:
        weight: integers, in the shape of the float weight.
        weight_scale: float32, () or (channels,).
        weight_zero_point: int32 (int64 above 24 bits), same shape.
        input_scale: float32 (); absent in a weight-only layer.
        input_zero_point: int32 (); absent in a weight-only layer.
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
        for name in cast(list[str], float_layer.__constants__):
            setattr(self, name, getattr(float_layer, name))
        float_weight = cast(Tensor, float_layer.weight)
        device = float_weight.device
        axis = spec.weight.axis
        channels = () if axis is None else (float_weight.shape[axis],)
        integers = torch.zeros(float_weight.shape, dtype=spec.weight.storage_dtype, device=device)
        self.register_buffer("weight", integers)
        self.register_buffer("weight_scale", torch.ones(channels, device=device))
        self.register_buffer(
            "weight_zero_point",
            torch.zeros(channels, dtype=_zero_point_dtype(spec.weight), device=device),
        )
        if spec.input is not None:
            self.register_buffer("input_scale", torch.ones((), device=device))
            self.register_buffer(
                "input_zero_point",
                torch.zeros((), dtype=_zero_point_dtype(spec.input), device=device),
            )
        bias = (
            torch.zeros(float_weight.shape[0], dtype=float_weight.dtype, device=device)
            if spec.bias
            else None
        )
        self.register_buffer("bias", bias)
        self.train(False)

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
            )
        )
        self.weight_scale.copy_(scale)
        self.weight_zero_point.copy_(zero_point)
        if input_parameters is not None:
            self.input_scale.copy_(input_parameters.scale)
            self.input_zero_point.copy_(input_parameters.zero_point)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

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
        return fake_quantize(
            input, self.input_scale, self.input_zero_point, scheme.quant_min, scheme.quant_max
        )

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight."""
        return dequantize(
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.spec.weight.axis,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        """Return the schemes, for printing."""
        return f"weight={self.spec.weight}, input={self.spec.input or 'float'}"


def _zero_point_dtype(scheme: QuantizationScheme) -> torch.dtype:
    return torch.int64 if scheme.bits > MAX_FLOAT32_BITS else torch.int32


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
        axis = self.spec.weight.axis
        if axis is not None and axis % self.weight.dim() == 0:
            scale, zero_point = scale[input.reshape(-1)], zero_point[input.reshape(-1)]
        values = dequantize(rows, scale, zero_point, axis, dtype=self._dtype)
        return values.reshape(*input.shape, -1)


_CONVOLUTIONS: dict[str, Any] = {"Conv1d": F.conv1d, "Conv2d": F.conv2d, "Conv3d": F.conv3d}

CONVERTED_CLASSES: dict[str, type[ConvertedLayer]] = {
    "Linear": ConvertedLinear,
    "Conv1d": ConvertedConv,
    "Conv2d": ConvertedConv,
    "Conv3d": ConvertedConv,
    "Embedding": ConvertedEmbedding,
}
