"""The products of quantization-aware layers, on integers where that pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization.autograd import apply, apply_to_parts
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
    IntegerInput,
    integer_input,
    why_no_integer_input,
    why_no_integer_weight,
)
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.rule import Decision, backward_of, decide
from compression_manager.quantization.integer.selection import passes_for
from compression_manager.quantization.integer.weights import integer_weight, quantizes_rows
from compression_manager.quantization.layers.base import Part, has_hooks
from compression_manager.quantization.layers.decisions import remember
from compression_manager.quantization.quantizers.quantizer_module import (
    FakeQuantizer,
    ObservedFakeQuantizer,
)
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.tensors.memory_format import dense

_FAKE = Decision("fake")


def linear(part: Part, options: ProductOptions, input: Tensor) -> Tensor:
    """Return `F.linear` of the quantized operands of `part`: (*, out features)."""
    passes = passes_for(input.device)
    decision = _decide(part, options, input, passes)
    integers = _integers(part, input, decision, passes)
    return _multiply(part, options, input, decision, integers, passes)


def project(
    joint: Part, parts: Sequence[Part], options: ProductOptions, input: Tensor
) -> tuple[Tensor, ...]:
    """Return `linear` of each of `parts`, computed together where all quantize the input alike.

    Args:
        joint: a part with the weight and the bias of all of them, and the quantizers of the first.
        parts: have equal shapes.
        options: how the layer multiplies.
        input: (*, in features).
    """
    passes = passes_for(input.device)
    decisions = [_decide(part, options, input, passes) for part in parts]
    found = [
        _integers(part, input, decision, passes)
        for part, decision in zip(parts, decisions, strict=True)
    ]
    first = found[0]
    if first is None or any(its is not first for its in found) or not _are_joined(parts):
        return tuple(
            _multiply(part, options, input, decision, its, passes)
            for part, decision, its in zip(parts, decisions, found, strict=True)
        )
    operands = _operands(joint, options, decisions[0], first, passes)
    inputs = [input] * len(parts)
    return apply_to_parts(IntegerLinear, joint.weight, joint.bias, operands, *inputs)


def _are_joined(parts: Sequence[Part]) -> bool:
    """Return whether the weights of trained parts are quantized row by row, all alike."""
    quantizers = [cast(ObservedFakeQuantizer, _weight_quantizer(part)) for part in parts]
    return all(
        # In evaluation each part's weight is kept in oneDNN's order.
        quantizer.training
        and quantizer.scheme == quantizers[0].scheme
        and quantizes_rows(quantizer)
        for quantizer in quantizers
    )


def _multiply(
    part: Part,
    options: ProductOptions,
    input: Tensor,
    decision: Decision,
    integers: IntegerInput | None,
    passes: Passes,
) -> Tensor:
    weight, bias = cast(Tensor, part.weight), part.bias
    if integers is None:
        return F.linear(_fake_input(part, input), _fake_weight(part), bias)
    operands = _operands(part, options, decision, integers, passes)
    return apply_to_parts(IntegerLinear, weight, bias, operands, input)[0]


def convolve(layer: nn.Conv2d, part: Part, options: ProductOptions, input: Tensor) -> Tensor:
    """Return the convolution of the quantized operands of `part`; shapes as the float layer."""
    weight, bias = cast(Tensor, part.weight), part.bias
    passes = passes_for(input.device)
    decision = _decide(part, options, input, passes, layer)
    integers = _integers(part, input, decision, passes)
    if integers is None:
        compute = cast(Callable[..., Tensor], layer._conv_forward)
        return compute(_fake_input(part, input), _fake_weight(part), bias)
    operands = _operands(part, options, decision, integers, passes)
    return apply(IntegerConvolution, input, weight, bias, operands, geometry_of(layer))


def _decide(
    part: Part,
    options: ProductOptions,
    input: Tensor,
    passes: Passes,
    convolution: nn.Conv2d | None = None,
) -> Decision:
    """Return how the product of `part` is computed, and remember it for the report."""
    if options.forward == "fake" or torch.compiler.is_compiling():
        return _FAKE
    weight, quantizer = cast(Tensor, part.weight), _weight_quantizer(part)
    reason = None if convolution is None else why_no_geometry(convolution, input)
    reason = reason or _why_no_operands(part)
    if reason is not None:
        decision = Decision("fake", reason)
    else:
        size = (
            linear_size(input, weight.shape)
            if convolution is None
            else convolution_size(convolution, input)
        )
        decision = decide(options, input, weight, size, passes, training=quantizer.training)
    remember(part, decision)
    return decision


def _integers(part: Part, input: Tensor, decision: Decision, passes: Passes) -> IntegerInput | None:
    """Return the integers of the input; None if the functions of `arithmetic` are to compute."""
    if decision.path == "fake":
        return None
    assert isinstance(part.input_quantizer, ObservedFakeQuantizer)  # or there were a reason
    return integer_input(part.input_quantizer, dense(input), passes)


def _operands(
    part: Part,
    options: ProductOptions,
    decision: Decision,
    integers: IntegerInput,
    passes: Passes,
) -> Operands:
    weight, quantizer = cast(Tensor, part.weight), _weight_quantizer(part)
    assert isinstance(quantizer, ObservedFakeQuantizer)  # or there were no integers
    return Operands(
        integers,
        integer_weight(quantizer, weight, passes, values=decision.path == "codes"),
        passes,
        backward_of(options, weight.device, passes),
        integers=decision.path == "integer",
        packs=not quantizer.training,
    )


def _why_no_operands(part: Part) -> str | None:
    """Return what about the quantizers rules out integers, or None."""
    if part.input_quantizer is None:
        return "its input stays in floating point"
    for quantizer, check in (
        (part.input_quantizer, why_no_integer_input),
        (_weight_quantizer(part), why_no_integer_weight),
    ):
        reason = why_no_integers_of(quantizer, check)
        if reason is not None:
            return reason
    return None if part.input_quantizer.is_calibrated() else "its input was not observed yet"


def why_no_integers_of(
    quantizer: FakeQuantizer, check: Callable[[QuantizationScheme], str | None]
) -> str | None:
    """Return why what `quantizer` returns is not made of integers, or None.

    Args:
        quantizer: of an input or a weight.
        check: returns what rules out its scheme.
    """
    if type(quantizer) is not ObservedFakeQuantizer or has_hooks(quantizer):
        return f"its {type(quantizer).__name__} has arithmetic of its own"
    if not quantizer.phase.quantizing:
        return "fake quantization has not begun"
    return check(quantizer.scheme)


def _weight_quantizer(part: Part) -> FakeQuantizer:
    assert part.weight_quantizer is not None  # linear layers and convolutions have a weight
    return part.weight_quantizer


def _fake_input(part: Part, input: Tensor) -> Tensor:
    return input if part.input_quantizer is None else cast(Tensor, part.input_quantizer(input))


def _fake_weight(part: Part) -> Tensor:
    return cast(Tensor, _weight_quantizer(part)(part.weight))
