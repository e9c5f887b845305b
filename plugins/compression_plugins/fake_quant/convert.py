"""Turning one trained, quantization-aware layer into its deployed form."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from compression_manager.deploy.layers import CONVERTED_CLASSES, ConvertedLayer, LayerSpec
from compression_manager.quantization import QuantizationParameters
from compression_manager.quantization.layers import QuantizedLayer


@torch.no_grad()
def convert_layer(layer: QuantizedLayer, batch_norm: _BatchNorm | None = None) -> ConvertedLayer:
    """Return the deployed form of `layer`, with `batch_norm` folded into it.

    An input that was never observed stays in floating point, as it did in training.

    Raises:
        QuantizationError: the weight is not finite.
    """
    weight = layer.weight.detach()
    weight_parameters = layer.weight_quantizer.quantization_parameters(weight)
    input_quantizer = layer.input_quantizer
    if input_quantizer is not None and not input_quantizer.is_calibrated():
        input_quantizer = None
    input_parameters = None
    if input_quantizer is not None and not input_quantizer.scheme.dynamic:
        input_parameters = input_quantizer.quantization_parameters()
    bias: Tensor | None = getattr(layer, "bias", None)
    factor = None
    if batch_norm is not None:
        factor, bias = fold_batch_norm(batch_norm, bias)
    spec = LayerSpec(
        kind=layer.float_class.__name__,
        weight=layer.weight_quantizer.scheme,
        input=None if input_quantizer is None else input_quantizer.scheme,
        bias=bias is not None,
    )
    converted = CONVERTED_CLASSES[spec.kind](layer, spec)
    converted.fill(weight, weight_parameters, input_parameters, bias)
    if factor is not None:
        _scale_channels(converted, weight_parameters, factor)
    return converted


def can_fold(layer: QuantizedLayer, batch_norm: _BatchNorm) -> bool:
    """Return whether folding changes only the scales: per-channel symmetric weights."""
    scheme = layer.weight_quantizer.scheme
    return (
        scheme.symmetric
        and scheme.signed
        and scheme.axis == 0
        and batch_norm.running_mean is not None
    )


def fold_batch_norm(batch_norm: _BatchNorm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return factor and bias, (channels,), with BatchNorm(x + bias) == x * factor + new bias.

    factor = gamma / sqrt(running_var + eps); new bias = (bias - running_mean) * factor + beta
    (Jacob et al. 2018, equation 14), computed in float64.
    """
    mean, variance = cast(Tensor, batch_norm.running_mean), cast(Tensor, batch_norm.running_var)
    factor = (variance.double() + batch_norm.eps).rsqrt()
    if batch_norm.weight is not None:
        factor = factor * batch_norm.weight.detach().double()
    shift = -mean.double() if bias is None else bias.detach().double() - mean.double()
    new_bias = shift * factor
    if batch_norm.bias is not None:
        new_bias = new_bias + batch_norm.bias.detach().double()
    return factor, new_bias


def _scale_channels(
    layer: ConvertedLayer, parameters: QuantizationParameters, factor: Tensor
) -> None:
    """Multiply output channel c by factor[c]: |factor| goes to the scale, its sign to the integers.

    A factor of zero (a zero-initialised gamma) leaves a channel of zeros with its old scale.
    """
    shape = (-1,) + (1,) * (layer.weight.dim() - 1)
    layer.weight.mul_(factor.sign().to(layer.weight.dtype).reshape(shape))
    scale = parameters.scale.double() * factor.abs()
    layer.weight_scale.copy_(torch.where(factor == 0, parameters.scale.double(), scale))
