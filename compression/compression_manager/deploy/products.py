"""The products of deployed layers: int8 kernels where the trained model computes on integers.

The rule, the kernels and so the results are those of the trained model. Elsewhere, and while
torch.export or torch.compile trace, weights are dequantized and multiplied in floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from compression_manager.quantization.integer import products
from compression_manager.quantization.integer.geometry import (
    convolution_size,
    geometry_of,
    linear_size,
    why_no_geometry,
)
from compression_manager.quantization.integer.operands import (
    IntegerInput,
    IntegerWeight,
    is_finite,
    quantize_finite,
    quantize_on_accelerator,
    why_no_integer_input,
    why_no_integer_weight,
)
from compression_manager.quantization.integer.passes import dense
from compression_manager.quantization.integer.rule import Decision, Size, decide
from compression_manager.quantization.integer.selection import active_passes
from compression_manager.quantization.recent import share, version_of

if TYPE_CHECKING:
    from compression_manager.deploy.layers import ConvertedLayer


@dataclass(frozen=True, eq=False)
class _Operand:
    """The weight of a layer as an operand, and the buffers that it was made of."""

    source: tuple[object, ...]
    weight: IntegerWeight


# Not in the modules: what oneDNN orders anew can be neither saved nor copied.
_operands: WeakKeyDictionary[nn.Module, _Operand] = WeakKeyDictionary()
_decisions: WeakKeyDictionary[nn.Module, Decision] = WeakKeyDictionary()


def last_decision(layer: nn.Module) -> Decision | None:
    """Return how the deployed `layer` computed last; None before its first call."""
    return _decisions.get(layer)


def linear(layer: ConvertedLayer, input: Tensor) -> Tensor | None:
    """Return the product of a deployed linear layer, or None if integers do not compute it.

    Args:
        layer: with a weight (out features, in features).
        input: (*, in features).
    """
    operand = None
    if _computes_integers(layer, input, lambda: linear_size(input, layer.weight_format.shape)):
        operand = _integers_of(layer, input)
    if operand is None:
        return None
    return products.linear(operand, _weight_of(layer), layer.bias, active_passes(), packs=True)


def convolve(layer: ConvertedLayer, input: Tensor) -> Tensor | None:
    """Return the result of a deployed convolution, or None if integers do not compute it."""
    reason = why_no_geometry(layer, input)
    if reason is not None:
        _remember(layer, Decision("fake", reason))
        return None
    operand = None
    if _computes_integers(layer, input, lambda: convolution_size(layer, input)):
        operand = _integers_of(layer, input)
    if operand is None:
        return None
    return products.convolve(operand, _weight_of(layer), layer.bias, geometry_of(layer), packs=True)


def _computes_integers(layer: ConvertedLayer, input: Tensor, size: Callable[[], Size]) -> bool:
    if torch.compiler.is_compiling():
        return False
    reason = _why_no_operands(layer)
    if torch.is_grad_enabled() and input.requires_grad:
        reason = "the gradient of its input is wanted"
    options = layer.product_options
    if reason is None:
        decision = decide(options, input, None, size(), training=False)
    else:
        decision = Decision("fake", reason)
    _remember(layer, decision)
    return decision.path == "integer"


def _remember(layer: nn.Module, decision: Decision) -> None:
    if not torch.compiler.is_compiling():
        _decisions[layer] = decision


def _why_no_operands(layer: ConvertedLayer) -> str | None:
    weight, input = layer.spec.weight, layer.spec.input
    if input is None:
        return "its input stays in floating point"
    assert weight is not None  # linear layers and convolutions have one
    return why_no_integer_input(input) or why_no_integer_weight(weight)


def _integers_of(layer: ConvertedLayer, input: Tensor) -> IntegerInput | None:
    """Return the integers of a finite input."""
    scheme, values = layer.spec.input, dense(input)
    assert scheme is not None  # or `_why_no_operands` had a reason
    if values.device.type != "cpu":
        return quantize_on_accelerator(values, layer.input_scale, layer.input_zero_point, scheme)
    share(values)
    values = values.detach()
    if not is_finite(values):
        return None
    return quantize_finite(
        values, layer.input_scale, layer.input_zero_point, scheme, active_passes()
    )


def _weight_of(layer: ConvertedLayer) -> IntegerWeight:
    """Return the layer's weight as an operand, which is made anew if a buffer changed."""
    tensors = (layer.weight, layer.weight_scale, layer.input_scale, layer.input_zero_point)
    source = tuple((tensor.data_ptr(), version_of(tensor)) for tensor in tensors)
    known = _operands.get(layer)
    if known is None or known.source != source:
        codes = layer.integer_weight().contiguous()
        scale = layer.weight_scale.expand(codes.shape[0]).contiguous()
        known = _operands[layer] = _Operand(source, IntegerWeight(codes, scale, None))
    return known.weight
