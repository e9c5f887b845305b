"""Products and sums of deployed layers: on integers where the trained model computes on them.

The rule, the kernels and so the results are those of the trained model. Elsewhere, and while
torch.export or torch.compile trace, weights are dequantized and multiplied in floating point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from compression_manager.quantization.integer import products
from compression_manager.quantization.integer.geometry import (
    Size,
    convolution_size,
    geometry_of,
    linear_size,
    why_no_geometry,
)
from compression_manager.quantization.integer.operands import (
    IntegerInput,
    IntegerWeight,
    quantize_input,
    why_no_integer_input,
)
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.rule import decide
from compression_manager.quantization.integer.selection import passes_for
from compression_manager.quantization.layers.sums import why_no_integers
from compression_manager.quantization.tensors.changes import sample_of, version_of
from compression_manager.quantization.tensors.memory_format import dense

if TYPE_CHECKING:
    from compression_manager.deploy.layers.base import ConvertedLayer


# Layer -> the buffers that its operand was made of, and the operand. Not in the modules: what
# oneDNN orders anew can be neither saved nor copied.
_weights: WeakKeyDictionary[nn.Module, tuple[object, IntegerWeight]] = WeakKeyDictionary()


def linear(layer: ConvertedLayer, input: Tensor) -> Tensor | None:
    """Return the product of a deployed linear layer, or None if integers do not compute it.

    Args:
        layer: with a weight (out features, in features).
        input: (*, in features).
    """
    if _is_seen_through(input) or not layer.spec.has_integer_factors:
        return None
    passes, size = passes_for(input.device), linear_size(input, layer.weight_format.shape)
    operand = _factor(layer, input, size, passes)
    if operand is None:
        return None
    return products.linear(operand, _weight_of(layer), layer.bias, passes, packs=True)


def add(layer: ConvertedLayer, input: Tensor, residual: Tensor) -> Tensor | None:
    """Return input + residual, or None if integers of the residual are not made.

    Args:
        layer: quantizes the residual.
        input: what it is added to.
        residual: the same shape, or one that broadcasts.
    """
    scheme = layer.spec.input
    if scheme is None or why_no_integer_input(scheme) is not None:
        return None
    if _is_seen_through(input) or _is_seen_through(residual):
        return None
    if why_no_integers(layer.spec.product_options, input, residual) is not None:
        return None
    passes = passes_for(residual.device)
    operand = _integers_of(layer, residual, passes)
    return None if operand is None else products.add(input, operand, passes)


def convolve(layer: ConvertedLayer, input: Tensor) -> Tensor | None:
    """Return the result of a deployed convolution, or None if integers do not compute it."""
    if _is_seen_through(input) or not layer.spec.has_integer_factors:
        return None
    if why_no_geometry(layer, input) is not None:
        return None
    passes = passes_for(input.device)
    operand = _factor(layer, input, convolution_size(layer, input), passes)
    if operand is None:
        return None
    weight, geometry = _weight_of(layer), geometry_of(layer)
    return products.convolve(operand, weight, layer.bias, geometry, passes, packs=True)


def _is_seen_through(input: Tensor) -> bool:
    """Return whether a compiler, or autograd, is to see what is computed of `input`."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and input.requires_grad)


def _factor(
    layer: ConvertedLayer, input: Tensor, size: Size, passes: Passes
) -> IntegerInput | None:
    """Return the integers of an input that is to be multiplied; None if others multiply."""
    decision = decide(layer.spec.product_options, input, None, size, passes, training=False)
    return _integers_of(layer, input, passes) if decision.path == "integer" else None


def _integers_of(layer: ConvertedLayer, input: Tensor, passes: Passes) -> IntegerInput | None:
    """Return the integers of a finite input."""
    scheme, values = layer.spec.input, dense(input)
    assert scheme is not None  # or there were no operands
    scale, zero_point = layer.input_scale, layer.input_zero_point
    return quantize_input(values, scale, zero_point, scheme, passes)


def _weight_of(layer: ConvertedLayer) -> IntegerWeight:
    """Return the layer's weight as an operand, which is made anew if a buffer changed."""
    stored, scale = layer.weight_tensors().values()  # of symmetric integers, there are no others
    source = (
        (stored.data_ptr(), version_of(stored), sample_of(stored)),
        # The scales of channels are read where they lie; one for all of them is a copy.
        (scale.data_ptr(), version_of(scale), [] if scale.dim() else sample_of(scale)),
    )
    known = _weights.get(layer)
    if known is None or known[0] != source:
        codes = layer.integer_weight().contiguous()
        scales = scale.expand(codes.shape[0]).contiguous()
        known = _weights[layer] = source, IntegerWeight(codes, scales, None)
    return known[1]
