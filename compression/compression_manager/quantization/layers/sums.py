"""The sum of a quantization-aware residual, from integers where float32 numbers are added."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from compression_manager.quantization.autograd import apply
from compression_manager.quantization.integer.functions import IntegerSum
from compression_manager.quantization.integer.operands import integer_input, why_no_integer_input
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.rule import Decision, why_no_codes
from compression_manager.quantization.integer.selection import passes_for
from compression_manager.quantization.layers.base import Part
from compression_manager.quantization.layers.decisions import remember
from compression_manager.quantization.layers.products import why_no_integers_of
from compression_manager.quantization.quantizers.quantizer_module import (
    FakeQuantizer,
    ObservedFakeQuantizer,
)
from compression_manager.quantization.tensors.memory_format import dense, is_dense


def add(part: Part, options: ProductOptions, input: Tensor, residual: Tensor) -> Tensor:
    """Return input + residual, the residual quantized.

    A layer that reads the residual, quantized alike, has made integers of it already; then nothing
    is left to do but to add what they stand for.

    Args:
        part: quantizes the residual, or leaves it in floating point.
        options: what the user chose for products.
        input: what the residual is added to.
        residual: the same shape, or one that broadcasts.
    """
    quantizer = part.input_quantizer
    if quantizer is None:
        return input + residual
    if _takes_integers(part, quantizer, options, input, residual):
        assert isinstance(quantizer, ObservedFakeQuantizer)  # or it took none
        passes = passes_for(residual.device)
        integers = integer_input(quantizer, dense(residual), passes)
        if integers is not None:
            return apply(IntegerSum, input, residual, integers, passes)
    return input + cast(Tensor, quantizer(residual))


def _takes_integers(
    part: Part,
    quantizer: FakeQuantizer,
    options: ProductOptions,
    input: Tensor,
    residual: Tensor,
) -> bool:
    """Return whether integers of a residual are added, and remember it for the report."""
    if options.forward == "fake" or torch.compiler.is_compiling():
        return False
    reason = why_no_integers_of(quantizer, why_no_integer_input)
    if reason is None and not quantizer.is_calibrated():
        reason = "its residual was not observed yet"
    reason = reason or why_no_integers(options, input, residual)
    remember(part, Decision("codes") if reason is None else Decision("fake", reason))
    return reason is None


def why_no_integers(options: ProductOptions, input: Tensor, residual: Tensor) -> str | None:
    """Return why no integers of a residual are made, whatever its scheme; None if they are."""
    # First, because a compiler or a tracer would take note of each question about shapes.
    reason = why_no_codes(options, residual, input)
    if reason is not None:
        return reason
    if not residual.is_cpu:
        return f"it computes on {residual.device.type}"
    if input.shape != residual.shape:
        return "its operands have different shapes"
    return None if is_dense(input) else "what the residual is added to has gaps or is transposed"
