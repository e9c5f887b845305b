"""Rounding real numbers to integers and back, as tensors.

The formula, which is also that of torch's own fake-quantize operators:

    q = clamp(round_half_even(x * (1 / scale)) + zero_point, quant_min, quant_max)
    y = (q - zero_point) * scale

1 / scale is rounded to float32 before the multiplication: dividing by the scale instead gives
other integers where x lies near the middle between two of them.

While torch.export traces, each function becomes one operator `compression_manager::...`, so that
exporters see what was meant; torch.compile traces into it, so that Inductor can fuse it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic import kernels, operators
from compression_manager.quantization.arithmetic.grid import as_tensor, check_numbers
from compression_manager.quantization.arithmetic.overridable import overridable
from compression_manager.quantization.exporting import exports_operators
from compression_manager.quantization.scheme import kernel_range


@overridable
def quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    group_size: int | None = None,
) -> Tensor:
    """Return the integers of `input`.

    Args:
        input: floating point, any shape and memory format.
        scale: positive, rounded to float32: (); (input.shape[axis],) with an axis; (rows, groups)
            with a group size, rows being input.shape[0]; or (*input.shape[:-1], 1) per token.
        zero_point: integer of real zero, shape as `scale`.
        quant_min: smallest integer.
        quant_max: largest integer.
        axis: channel axis (may be negative), or None.
        group_size: consecutive values within a row that share a scale, or None.

    Returns:
        The shape of `input`, in the smallest dtype that holds the range (uint8 if it has no
        negative numbers). Infinities become the ends of the range; NaN, which no integer can
        represent, becomes the zero point.

    Raises:
        QuantizationError: a dtype, shape or range that does not fit.
    """
    scale, zero_point = _as_tensors(scale, zero_point, input)
    compute = operators.quantize if exports_operators(eight_bits=False) else kernels.quantize
    return compute(input, scale, zero_point, quant_min, quant_max, axis, group_size)


@overridable
def dequantize(
    quantized: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    axis: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    group_size: int | None = None,
) -> Tensor:
    """Return the real numbers that the integers `quantized` stand for.

    Args:
        quantized: integers, any shape and memory format.
        scale: shapes as for `quantize`; rounded to float32.
        zero_point: integer of real zero, shape as `scale`.
        axis: channel axis (may be negative), or None.
        dtype: floating-point type of the result; narrower ones are computed in float32, and
            what exceeds their largest number becomes it.
        group_size: consecutive values within a row that share a scale, or None.

    Raises:
        QuantizationError: a dtype or shape that does not fit.
    """
    if quantized.is_floating_point() or quantized.is_complex() or quantized.dtype == torch.bool:
        raise QuantizationError(f"dequantize takes an integer tensor, got {quantized.dtype}.")
    if not dtype.is_floating_point:
        raise QuantizationError(f"dequantize returns floating-point numbers, not {dtype}.")
    eight_bits = (
        quantized.dtype == torch.int8
        and dtype == torch.float32
        and group_size is None
        # A symmetric scheme; what a tensor holds is not known while it is traced.
        and isinstance(zero_point, int)
        and zero_point == 0
    )
    scale, zero_point = _as_tensors(scale, zero_point, quantized)
    is_operator = exports_operators(eight_bits=eight_bits)
    compute = operators.dequantize if is_operator else kernels.dequantize
    return compute(quantized, scale, zero_point, axis, group_size, dtype)


@overridable
def fake_quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    group_size: int | None = None,
    pass_clipped_gradient: bool = False,
) -> Tensor:
    """Return `dequantize(quantize(input))`, differentiable with the straight-through estimator.

    The gradient passes unchanged where the rounded input lies in the range and is exactly zero
    where it was clipped (Jacob et al., 2018, arXiv:1712.05877), unless `pass_clipped_gradient`.
    Scale and zero point get no gradient. Between forward and backward one byte per element is
    kept, not the input; on CPUs nothing is kept of a tensor in which nothing is clipped.

    Args:
        input: floating point, any shape and memory format; float64 is computed in float64,
            all else in float32, ranges of more than 24 bits in float64.
        scale: shapes as for `quantize`; rounded to float32; positive.
        zero_point: integer of real zero, shape as `scale`.
        quant_min: smallest integer.
        quant_max: largest integer.
        axis: channel axis (may be negative), or None.
        group_size: consecutive values within a row that share a scale, or None.
        pass_clipped_gradient: let the gradient pass everywhere (AiDotNet's convention, and that
            of Bengio et al., 2013, arXiv:1308.3432).

    Returns:
        Shape, dtype and memory format of `input`. NaN stays NaN (its gradient is zero unless
        all pass), infinities become the ends of the range. A level that float16 or bfloat16 cannot
        hold becomes their largest number: min-max ranges may end half a step beyond their values.

    Raises:
        QuantizationError: a dtype, shape or range that does not fit.
    """
    scale, zero_point = _as_tensors(scale, zero_point, input)
    eight_bits = (
        input.dtype == torch.float32
        and scale.dim() == 0
        and axis is None
        and kernel_range(quant_min, quant_max) is not None
    )
    is_operator = exports_operators(eight_bits=eight_bits)
    compute = operators.fake_quantize if is_operator else kernels.fake_quantize
    return compute(
        input, scale, zero_point, quant_min, quant_max, axis, group_size, pass_clipped_gradient
    )


def _as_tensors(
    scale: Tensor | float, zero_point: Tensor | int, like: Tensor
) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        check_numbers(scale, zero_point)
    return (
        as_tensor(scale, torch.float32, like.device),
        as_tensor(zero_point, torch.int64, like.device),
    )
