"""The products of quantization-aware layers, on integers where that pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization.autograd import apply
from compression_manager.quantization.integer.functions import (
    IntegerConvolution,
    IntegerLinear,
    Operands,
)
from compression_manager.quantization.integer.geometry import (
    convolution_size,
    geometry_of,
    linear_size,
    why_no_geometry,
)
from compression_manager.quantization.integer.operands import (
    integer_input,
    integer_weight,
    why_no_integer_input,
    why_no_integer_weight,
)
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.rule import Decision, Size, backward_of, decide
from compression_manager.quantization.integer.selection import TORCH, active_passes
from compression_manager.quantization.layers.base import Part, QuantizedLayer
from compression_manager.quantization.memory_format import dense
from compression_manager.quantization.quantizer_module import FakeQuantizer, ObservedFakeQuantizer

_decisions: WeakKeyDictionary[FakeQuantizer, Decision] = WeakKeyDictionary()


def last_decision(part: Part) -> Decision | None:
    """Return how the product of `part` was computed last; None before its first call."""
    return None if part.weight_quantizer is None else _decisions.get(part.weight_quantizer)


_WORDS = {
    "integer": "products of integers with 32-bit sums",
    "codes": "float32 products, integers kept for backward",
    "fake": "float32 products of fake-quantized operands",
}


def describe_arithmetic(layer: QuantizedLayer) -> str:
    """Return how the products of `layer` were computed last, and why not on integers."""
    lines = []
    for part in layer.parts().values():
        decision = last_decision(part)
        if decision is not None:
            reason = f" ({decision.reason})" if decision.reason else ""
            lines.append(f"{_WORDS[decision.path]}{reason}")
    return "; ".join(dict.fromkeys(lines))


def computes_integers(layer: QuantizedLayer) -> bool:
    """Return whether all products of `layer` were computed on integers last."""
    decisions = [last_decision(part) for part in layer.parts().values()]
    return bool(decisions) and all(
        decision is not None and decision.path == "integer" for decision in decisions
    )


def linear(part: Part, options: ProductOptions, input: Tensor) -> Tensor:
    """Return `F.linear` of the quantized operands of `part`: (*, out features)."""
    weight, bias = cast(Tensor, part.weight), part.bias
    operands = _operands(part, options, input, linear_size(input, weight.shape))
    if operands is None:
        return F.linear(_fake_input(part, input), _fake_weight(part), bias)
    return apply(IntegerLinear, input, weight, bias, operands)


def convolve(layer: nn.Conv2d, part: Part, options: ProductOptions, input: Tensor) -> Tensor:
    """Return the convolution of the quantized operands of `part`; shapes as the float layer."""
    weight, bias = cast(Tensor, part.weight), part.bias
    reason = why_no_geometry(layer, input)
    operands = None
    if reason is None:
        operands = _operands(part, options, input, convolution_size(layer, input))
    elif not torch.compiler.is_compiling():
        _decisions[_weight_quantizer(part)] = Decision("fake", reason)
    if operands is None:
        compute = cast(Callable[..., Tensor], layer._conv_forward)
        return compute(_fake_input(part, input), _fake_weight(part), bias)
    return apply(IntegerConvolution, input, weight, bias, operands, geometry_of(layer))


def _operands(part: Part, options: ProductOptions, input: Tensor, size: Size) -> Operands | None:
    """Return the integers to compute with, or None for the functions of `arithmetic`."""
    if options.forward == "fake" or torch.compiler.is_compiling():
        return None
    weight, quantizer = cast(Tensor, part.weight), _weight_quantizer(part)
    reason = _why_no_operands(part)
    training = quantizer.training
    if reason is None:
        decision = decide(options, input, weight, size, training=training)
    else:
        decision = Decision("fake", reason)
    _decisions[quantizer] = decision
    if decision.path == "fake":
        return None
    assert isinstance(part.input_quantizer, ObservedFakeQuantizer)  # or there were a reason
    assert isinstance(quantizer, ObservedFakeQuantizer)
    passes = active_passes() if input.device.type == "cpu" else TORCH
    input_integers = integer_input(part.input_quantizer, dense(input), passes)
    if input_integers is None:
        return None
    return Operands(
        input_integers,
        integer_weight(quantizer, weight, passes),
        passes,
        backward_of(options, input.device, passes),
        integers=decision.path == "integer",
        packs=not training,
    )


def _why_no_operands(part: Part) -> str | None:
    """Return what about the quantizers rules out integers, or None."""
    if part.input_quantizer is None:
        return "its input stays in floating point"
    for quantizer, check in (
        (part.input_quantizer, why_no_integer_input),
        (_weight_quantizer(part), why_no_integer_weight),
    ):
        if type(quantizer) is not ObservedFakeQuantizer or _has_hooks(quantizer):
            return f"its {type(quantizer).__name__} has arithmetic of its own"
        if not quantizer.phase.quantizing:
            return "fake quantization has not begun"
        reason = check(quantizer.scheme)
        if reason is not None:
            return reason
    return None if part.input_quantizer.is_calibrated() else "its input was not observed yet"


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _weight_quantizer(part: Part) -> FakeQuantizer:
    assert part.weight_quantizer is not None  # linear layers and convolutions have a weight
    return part.weight_quantizer


def _fake_input(part: Part, input: Tensor) -> Tensor:
    return input if part.input_quantizer is None else cast(Tensor, part.input_quantizer(input))


def _fake_weight(part: Part) -> Tensor:
    return cast(Tensor, _weight_quantizer(part)(part.weight))
