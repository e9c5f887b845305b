"""The operands of an integer product: what a fake quantizer stands for, as integers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compression_manager.quantization.arithmetic import scalars
from compression_manager.quantization.integer.passes import Ends, Passes
from compression_manager.quantization.integer.selection import TORCH
from compression_manager.quantization.quantizers.quantizer_module import ObservedFakeQuantizer
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.tensors.recent import remembered

_BITS = 8
# What the smallest and the largest value of a tensor are remembered under.
_ENDS = "ends"
# More steps than any range has.
_FAR = 2.0**20


@dataclass(eq=False, slots=True)
class IntegerInput:
    """A quantized activation.

    Attributes:
        codes: uint8 or int8, in the shape and memory format of the input.
        scale: float32 (); in training a copy.
        zero_point: int32 (); in training a copy.
        clipped: bits in memory order of the elements outside of the range, or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    clipped: Tensor | None


@dataclass(eq=False, slots=True)
class IntegerWeight:
    """A quantized weight, symmetric around zero.

    Attributes:
        codes: int8, (rows, ...).
        scale: float32 (rows,).
        clipped: bits of the elements outside of the range, or None.
        packed: the codes in the order that oneDNN multiplies them in, once they were asked for;
            neither to be saved nor to be traced.
    """

    codes: Tensor
    scale: Tensor
    clipped: Tensor | None
    packed: Tensor | None = None

    def parts(self, count: int) -> list[IntegerWeight]:
        """Return `count` equal parts of the rows of a weight without clipped elements."""
        if count == 1:
            return [self]
        pairs = zip(self.codes.chunk(count), self.scale.chunk(count), strict=True)
        return [IntegerWeight(codes, scale, None) for codes, scale in pairs]


def why_no_integer_input(scheme: QuantizationScheme) -> str | None:
    """Return why activations of `scheme` are no operands, or None if they are."""
    if scheme.dynamic or scheme.granularity != "tensor":
        return "its input's scale is not that of the whole tensor"
    return f"its input has {scheme.bits} bits" if scheme.bits > _BITS else None


def why_no_integer_weight(scheme: QuantizationScheme) -> str | None:
    """Return why weights of `scheme` are no operands, or None if they are."""
    if scheme.bits > _BITS:
        return f"its weight has {scheme.bits} bits"
    if not scheme.symmetric or scheme.quant_min >= 0:
        return "its weight is not symmetric around zero"
    if scheme.granularity not in ("tensor", "channel") or scheme.axis not in (None, 0):
        return "its weight has scales within an output channel"
    return None


def integer_input(
    quantizer: ObservedFakeQuantizer, input: Tensor, passes: Passes
) -> IntegerInput | None:
    """Return the integers of `input`, which the quantizer follows in training as always.

    Args:
        quantizer: quantizes already, with a scheme that `why_no_integer_input` accepts.
        input: float32, contiguous or channels_last.

    Returns:
        None if a value on the CPU is not finite, for which only floating point has a place.
    """
    if not input.is_cpu:
        quantizer.follow(input)
        return quantize_on_accelerator(
            input.detach(), quantizer.scale, quantizer.zero_point, quantizer.scheme
        )
    known, input = remembered(input), input.detach()
    ends = _finite_ends(input, known, passes)
    if ends is None:
        return None
    scheme = quantizer.scheme
    grid = *quantizer.follow_ends(input, *ends), scheme.quant_min, scheme.quant_max
    key = passes.name, grid
    found: IntegerInput | None = known.get(key)
    if found is None:
        found = known[key] = _quantize_finite(input, ends, *grid, passes)
    return found


def quantize_input(
    input: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme, passes: Passes
) -> IntegerInput | None:
    """Return the integers of an activation with a scale that is given.

    Args:
        input: float32, contiguous or channels_last.
        scale: float32 (), on the same device; it is part of what is returned, not a copy.
        zero_point: int32 (), on the same device; likewise.
        scheme: one that `why_no_integer_input` accepts.
        passes: what computes on the CPU.

    Returns:
        As `integer_input`; on the CPU without the bits of what was clipped.
    """
    input = input.detach()
    if not input.is_cpu:
        return quantize_on_accelerator(input, scale, zero_point, scheme)
    inverse = scalars.float32(1.0 / float(scale))
    limits = scheme.quant_min, scheme.quant_max
    codes = passes.quantize_finite(input, inverse, int(zero_point), *limits)
    return None if codes is None else IntegerInput(codes, scale, zero_point, None)


def _quantize_finite(
    input: Tensor,
    ends: Ends,
    step: float,
    offset: int,
    quant_min: int,
    quant_max: int,
    passes: Passes,
) -> IntegerInput:
    inverse = scalars.float32(1.0 / step)
    codes, clipped = passes.quantize(
        input,
        inverse,
        offset,
        quant_min,
        quant_max,
        below=_steps(ends[0], inverse) + offset < quant_min,
        above=_steps(ends[1], inverse) + offset > quant_max,
    )
    # Tensors of their own, because the buffers of the quantizer follow the next batch in place.
    scale = torch.scalar_tensor(step, dtype=torch.float32, device=input.device)
    zero_point = torch.scalar_tensor(offset, dtype=torch.int32, device=input.device)
    return IntegerInput(codes, scale, zero_point, clipped)


def remember_ends(tensor: Tensor, ends: Ends) -> None:
    """Keep the smallest and the largest value of what autograd follows, for who quantizes it."""
    remembered(tensor)[_ENDS] = ends


def _finite_ends(input: Tensor, known: dict[object, Any], passes: Passes) -> Ends | None:
    """Return the smallest and the largest value, unless one is not finite."""
    ends: Ends | None = known.get(_ENDS)
    if ends is None:
        ends = known[_ENDS] = passes.ends(input)
    return ends if math.isfinite(ends[0]) and math.isfinite(ends[1]) else None


def _steps(value: float, inverse_scale: float) -> int:
    """Return round(value * inverse_scale) as float32 computes it; far outside, some large one."""
    product = value * inverse_scale
    return round(scalars.float32(product)) if abs(product) < _FAR else int(product)


def quantize_on_accelerator(
    input: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme
) -> IntegerInput:
    """Return the integers of an activation without waiting for the device.

    Scales stay tensors, and clipped bits are kept even if there are none. One value that is not a
    number makes the scale so, and with it the whole result.
    """
    grid = scale.reciprocal(), zero_point, scheme.quant_min, scheme.quant_max
    codes, clipped = TORCH.quantize(input, *grid, below=True, above=True)
    finite_scale = torch.where(input.sum().isnan(), torch.nan, scale)
    return IntegerInput(codes, finite_scale, zero_point.clone(), clipped)
