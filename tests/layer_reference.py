"""Quantization-aware layers built by hand, and numpy's account of what they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compression_manager.quantization import (
    FakeQuantizer,
    ObservedFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
)
from compression_manager.quantization.layers import (
    QuantizedLayer,
    Quantizers,
    quantize_parts,
    quantized_class,
)
from compression_plugins.calibration import MinMaxObserver
from quantization_reference import activation_grid, fake_quantized, weight_grid

WEIGHT = QuantizationScheme(granularity="channel")
ACTIVATION = QuantizationScheme(symmetric=False, signed=False)


def quantizer(role, scheme, weight=None, *, on=True) -> FakeQuantizer:
    channels = None if weight is None or scheme.axis is None else weight.shape[scheme.axis]
    shape = None if weight is None else tuple(weight.shape)
    site = QuantizationSite("layer", role, channels, shape=shape)
    result = ObservedFakeQuantizer(scheme, site, MinMaxObserver(scheme, site))
    result.set_phase(observing=True, quantizing=on)
    return result


def quantized(
    layer: nn.Module, *, weight_only=False, scheme=WEIGHT, activation=ACTIVATION, on=True
) -> QuantizedLayer:
    """The layer with its class changed; observing, and quantizing if `on`."""
    kind = quantized_class(type(layer))
    assert kind is not None
    inputs = kind.quantizes_input and not weight_only
    return quantize_parts(
        layer,
        {
            name: Quantizers(
                None if weight is None else quantizer("weight", scheme, weight, on=on),
                quantizer("activation", activation, on=on) if inputs else None,
            )
            for name, (weight, _) in kind.operands_of(layer).items()
        },
    )


def quantized_weight(weight: Tensor, axis: int | None = 0) -> tuple[Tensor, Tensor]:
    """Numpy's int8 weight, and where the gradient passes."""
    values = weight.detach().numpy()
    result, passes = fake_quantized(values, weight_grid(values, axis), axis)
    return torch.from_numpy(result), torch.from_numpy(passes)


def quantized_input(input: Tensor) -> tuple[Tensor, Tensor]:
    """Numpy's uint8 input, with the input's own range, and where the gradient passes."""
    values = input.detach().numpy()
    result, passes = fake_quantized(values, activation_grid(values.min(), values.max()))
    return torch.from_numpy(result), torch.from_numpy(passes)


def reference(input, weight, bias, operation, *, weight_only=False, axis=0):
    """Output of `operation` on quantized operands, and the straight-through gradients."""
    results = [quantized_weight(weight, axis)]
    if not weight_only:
        results.append(quantized_input(input))
    leaves = [value.requires_grad_() for value, _ in results]
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    output = operation(input if weight_only else leaves[1], leaves[0], bias)
    output.sin().sum().backward()
    gradients = [leaf.grad * passes for leaf, (_, passes) in zip(leaves, results, strict=True)]
    return output.detach(), gradients, None if bias is None else bias.grad


def check(layer, input, operation, *, weight_only=False, axis=0, **arguments):
    """Compare a layer of one weight with `reference`; `axis` counts in the layer's own layout."""
    expected, gradients, bias_gradient = reference(
        input, layer.weight, getattr(layer, "bias", None), operation,
        weight_only=weight_only, axis=axis,
    )  # fmt: skip
    output = layer(input, **arguments)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    output.sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, gradients[0], rtol=1e-5, atol=1e-5)
    if not weight_only:
        torch.testing.assert_close(input.grad, gradients[1], rtol=1e-5, atol=1e-5)
    if bias_gradient is not None:
        torch.testing.assert_close(layer.bias.grad, bias_gradient, rtol=1e-5, atol=1e-5)
