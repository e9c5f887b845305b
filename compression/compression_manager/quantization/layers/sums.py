"""The sum of a quantization-aware residual, on integers where they are kept anyway."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from compression_manager.quantization.autograd import apply
from compression_manager.quantization.integer.functions import IntegerSum
from compression_manager.quantization.integer.operands import (
    IntegerInput,
    integer_input,
    why_no_integer_input,
)
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.rule import why_no_codes
from compression_manager.quantization.integer.selection import passes_for
from compression_manager.quantization.layers.products import why_no_integers_of
from compression_manager.quantization.memory_format import dense, is_dense
from compression_manager.quantization.quantizer_module import FakeQuantizer, ObservedFakeQuantizer


def add(
    quantizer: FakeQuantizer | None, options: ProductOptions, input: Tensor, residual: Tensor
) -> Tensor:
    """Return input + residual, the residual quantized.

    A layer that reads the residual has made integers of it already, in most cases with the same
    range, so that nothing is left to do but to add what they stand for.

    Args:
        quantizer: of the residual; None leaves it in floating point.
        options: what the user chose for products.
        input: what the residual is added to.
        residual: the same shape, or one that broadcasts.
    """
    if quantizer is None:
        return input + residual
    passes = passes_for(residual.device)
    integers = _integers(quantizer, options, input, residual, passes)
    if integers is None:
        return input + cast(Tensor, quantizer(residual))
    return apply(IntegerSum, input, residual, integers, passes)


def _integers(
    quantizer: FakeQuantizer,
    options: ProductOptions,
    input: Tensor,
    residual: Tensor,
    passes: Passes,
) -> IntegerInput | None:
    """Return the integers of the residual; None if the functions of `arithmetic` are to compute."""
    if not takes_integers(options, input, residual):
        return None
    if why_no_integers_of(quantizer, why_no_integer_input) or not quantizer.is_calibrated():
        return None
    assert isinstance(quantizer, ObservedFakeQuantizer)  # or there were a reason
    return integer_input(quantizer, dense(residual), passes)


def takes_integers(options: ProductOptions, input: Tensor, residual: Tensor) -> bool:
    """Return whether integers are made of a residual, if its scheme has them: on the CPU."""
    return (
        residual.is_cpu
        and input.shape == residual.shape
        and is_dense(input)
        and why_no_codes(options, residual, input) is None
    )
