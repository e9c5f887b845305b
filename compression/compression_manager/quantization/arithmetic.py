"""Rounding real numbers to integers and back, as tensors.

The formula, which is also that of torch's own fake-quantize operators:

    q = clamp(round_half_even(x * (1 / scale)) + zero_point, quant_min, quant_max)
    y = (q - zero_point) * scale

1 / scale is rounded to float32 before the multiplication: dividing by the scale instead gives
other integers where x lies near the middle between two of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.scheme import MAX_FLOAT32_BITS, storage_dtype


def quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """Return the integers of `input`.

    Args:
        input: floating point, any shape and memory format.
        scale: (), or (input.shape[axis],) with an axis; rounded to float32; positive.
        zero_point: integer of real zero, shape as `scale`.
        quant_min: smallest integer.
        quant_max: largest integer.
        axis: channel axis (may be negative), or None for one scale.

    Returns:
        The shape of `input`, in the smallest dtype that holds the range (uint8 if it has no
        negative numbers). Infinities become the ends of the range; NaN, which no integer can
        represent, becomes the zero point.

    Raises:
        QuantizationError: a dtype, shape or range that does not fit.
    """
    grid = _make_grid(input, scale, zero_point, axis, _compute_dtype(input, quant_min, quant_max))
    steps = _steps(input, grid).nan_to_num_(nan=0.0)
    code = steps.add_(grid.zero_point).clamp_(quant_min, quant_max)
    return code.to(storage_dtype(quant_min, quant_max))


def dequantize(
    quantized: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    axis: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the real numbers that the integers `quantized` stand for.

    Args:
        quantized: integers, any shape and memory format.
        scale: (), or (quantized.shape[axis],) with an axis; rounded to float32.
        zero_point: integer of real zero, shape as `scale`.
        axis: channel axis (may be negative), or None for one scale.
        dtype: floating-point type of the result; narrower ones are computed in float32.

    Raises:
        QuantizationError: a dtype or shape that does not fit.
    """
    if quantized.is_floating_point() or quantized.is_complex() or quantized.dtype == torch.bool:
        raise QuantizationError(f"dequantize takes an integer tensor, got {quantized.dtype}.")
    if not dtype.is_floating_point:
        raise QuantizationError(f"dequantize returns floating-point numbers, not {dtype}.")
    # The product of 32-bit integers and a float32 is exact in float64, so that rounding it
    # once gives what float32 arithmetic gives for the shorter integers stored this way.
    wide = dtype == torch.float64 or quantized.dtype in (torch.int32, torch.int64)
    compute = torch.float64 if wide else torch.float32
    grid = _make_grid(quantized, scale, zero_point, axis, compute)
    return _values(quantized.to(compute), grid).to(dtype)


def fake_quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """Return `dequantize(quantize(input))`, differentiable with the straight-through estimator.

    The gradient passes unchanged where the rounded input lies in the range and is exactly zero
    where it was clipped (Jacob et al., 2018, arXiv:1712.05877). Scale and zero point get
    no gradient. Between forward and backward one byte per element is kept, not the input.

    Args:
        input: floating point, any shape and memory format; float64 is computed in float64,
            all else in float32, ranges of more than 24 bits in float64.
        scale: (), or (input.shape[axis],) with an axis; rounded to float32; positive.
        zero_point: integer of real zero, shape as `scale`.
        quant_min: smallest integer.
        quant_max: largest integer.
        axis: channel axis (may be negative), or None for one scale.

    Returns:
        Shape, dtype and memory format of `input`. NaN stays NaN (its gradient is zero),
        infinities become the ends of the range.

    Raises:
        QuantizationError: a dtype, shape or range that does not fit.
    """
    grid = _make_grid(input, scale, zero_point, axis, _compute_dtype(input, quant_min, quant_max))
    if torch.is_grad_enabled() and input.requires_grad:
        # Function.apply is untyped in torch.
        output: Tensor = _StraightThrough.apply(input, *grid, quant_min, quant_max)  # type: ignore[no-untyped-call]
        return output
    code = _steps(input, grid).add_(grid.zero_point).clamp_(quant_min, quant_max)
    return _values(code, grid).to(input.dtype)


class _Grid(NamedTuple):
    """Parameters in the dtype of the computation, shaped to broadcast against the input."""

    inverse_scale: Tensor
    scale: Tensor
    zero_point: Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        inverse_scale: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
    ) -> Tensor:
        grid = _Grid(inverse_scale, scale, zero_point)
        unclipped = _steps(input, grid).add_(zero_point)
        code = unclipped.clamp(quant_min, quant_max)
        ctx.save_for_backward(unclipped != code)
        return _values(code, grid).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (clipped,) = ctx.saved_tensors
        # Not a product: zero times an infinite gradient would be NaN.
        return torch.where(clipped, 0.0, grad_output), None, None, None, None, None


def _steps(input: Tensor, grid: _Grid) -> Tensor:
    """Return round(input / scale) as a new tensor in the dtype of the computation."""
    return (input.to(grid.scale.dtype) * grid.inverse_scale).round_()


def _values(code: Tensor, grid: _Grid) -> Tensor:
    """Turn integers held in floating point into real numbers, in place of them."""
    return code.sub_(grid.zero_point).mul_(grid.scale)


def _compute_dtype(input: Tensor, quant_min: int, quant_max: int) -> torch.dtype:
    if not input.is_floating_point():
        raise QuantizationError(f"only floating-point tensors are quantized, got {input.dtype}.")
    if quant_min >= quant_max:
        raise QuantizationError(
            f"quant_min must be less than quant_max, got {quant_min} and {quant_max}."
        )
    wide = quant_max - quant_min >= 2**MAX_FLOAT32_BITS
    return torch.float64 if wide or input.dtype == torch.float64 else torch.float32


def _make_grid(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    axis: int | None,
    dtype: torch.dtype,
) -> _Grid:
    if axis is not None and not -input.dim() <= axis < input.dim():
        raise QuantizationError(
            f"axis {axis} does not exist in a tensor of shape {tuple(input.shape)}."
        )
    scale = _as_tensor(scale, torch.float32, input.device)
    zero_point = _as_tensor(zero_point, torch.int64, input.device)
    inverse_scale = scale.reciprocal()
    return _Grid(
        _broadcast("scale", inverse_scale, input, axis).to(dtype),
        _broadcast("scale", scale, input, axis).to(dtype),
        _broadcast("zero_point", zero_point, input, axis).to(dtype),
    )


def _as_tensor(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32) if dtype == torch.float32 else value.detach()
    return torch.full((), value, dtype=dtype, device=device)


def _broadcast(name: str, value: Tensor, input: Tensor, axis: int | None) -> Tensor:
    """Return `value`, () or (channels,), shaped to broadcast against `input`."""
    if value.dim() == 0:
        return value
    if axis is None:
        if value.numel() != 1:
            raise QuantizationError(
                f"{name} of shape {tuple(value.shape)} needs an axis; without one it has a "
                "single element."
            )
        return value.reshape(())
    if value.dim() != 1 or value.shape[0] != input.shape[axis]:
        raise QuantizationError(
            f"{name} of shape {tuple(value.shape)} does not fit axis {axis} of a tensor of shape "
            f"{tuple(input.shape)}; expected ({input.shape[axis]},)."
        )
    shape = [1] * input.dim()
    shape[axis] = -1
    return value.reshape(shape)
