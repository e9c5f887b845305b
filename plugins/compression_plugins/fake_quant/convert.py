"""Turning one trained, quantization-aware layer into its deployed form."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.kinds import CONVERTED_CLASSES
from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.quantization.layers import Part, QuantizedLayer


@torch.no_grad()
def convert_layer(layer: QuantizedLayer, batch_norm: _BatchNorm | None = None) -> ConvertedLayer:
    """Return the deployed form of `layer`, with `batch_norm` folded into it.

    An input that was never observed stays in floating point, as it did in training.

    Raises:
        QuantizationError: the weight is not finite.
    """
    factor = bias = None
    parts = layer.parts()
    if batch_norm is not None:
        factor, bias = fold_batch_norm(batch_norm, parts[""].bias)
        parts[""] = parts[""]._replace(bias=bias)
    calibrated = all(quantizer.is_calibrated() for quantizer in layer.input_quantizers())
    spec = LayerSpec(
        kind=layer.float_class.__name__,
        weight=layer.weight_scheme,
        input=layer.input_scheme if calibrated else None,
        bias=any(part.bias is not None for part in parts.values()),
        forward=layer.product_options.forward,
    )
    converted = CONVERTED_CLASSES[spec.kind](layer, spec)
    for name, part in parts.items():
        stored = cast(ConvertedLayer, converted.get_submodule(name))
        _fill(stored, part, factor)
    return converted


def _fill(converted: ConvertedLayer, part: Part, factor: Tensor | None) -> None:
    """Fill `converted` with `part`, whose output channel c is multiplied by factor[c].

    |factor| goes to the scale, its sign to the integers. A factor of zero (a zero-initialised
    gamma) leaves a channel of zeros with its old scale.
    """
    quantizer, input_parameters = part.input_quantizer, None
    if quantizer is not None and converted.spec.input is not None and not quantizer.scheme.dynamic:
        input_parameters = quantizer.quantization_parameters()
    if part.weight is None or part.weight_quantizer is None:
        converted.fill_input(input_parameters)
        return
    weight = part.weight.detach()
    weight_parameters = part.weight_quantizer.quantization_parameters(weight)
    if factor is not None:
        # The negative of a number rounds to the negative of its integer, which `can_fold` ensures.
        weight = weight * factor.sign().to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))
    converted.fill(weight, weight_parameters, input_parameters, part.bias)
    if factor is not None:
        before = converted.weight_scale.double()
        converted.weight_scale.copy_(torch.where(factor == 0, before, before * factor.abs()))


def can_fold(layer: QuantizedLayer, batch_norm: _BatchNorm) -> bool:
    """Return whether folding changes only scales and signs: per-channel symmetric weights."""
    scheme = layer.weight_scheme
    return (
        scheme is not None
        and scheme.symmetric
        and scheme.quant_min == -scheme.quant_max
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
