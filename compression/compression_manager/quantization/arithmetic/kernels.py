"""The formulas of `rounding`, computed; callers have checked dtypes, the grid checks shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compression_manager.quantization.arithmetic.grid import Grid, compute_dtype, make_grid
from compression_manager.quantization.arithmetic.ranges import extremes
from compression_manager.quantization.autograd import apply, apply_to_parts, transforms_run
from compression_manager.quantization.scheme import storage_dtype


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> Tensor:
    """Return the integers of `input`; NaN becomes the zero point."""
    dtype = compute_dtype(input, quant_min, quant_max)
    grid = make_grid(input, scale, zero_point, axis, group_size, dtype)
    steps = _steps(input, grid).nan_to_num_(nan=0.0)
    code = steps.add_(grid.zero_point).clamp_(quant_min, quant_max)
    return code.to(storage_dtype(quant_min, quant_max))


def dequantize(
    quantized: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the real numbers that the integers stand for."""
    # The product of 32-bit integers and a float32 is exact in float64, so that rounding it
    # once gives what float32 arithmetic gives for the shorter integers stored this way.
    wide = dtype == torch.float64 or quantized.dtype in (torch.int32, torch.int64)
    compute = torch.float64 if wide else torch.float32
    grid = make_grid(quantized, scale, zero_point, axis, group_size, compute)
    return _rounded(_values(quantized.to(compute), grid), dtype)


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
    pass_clipped_gradient: bool,
) -> Tensor:
    """Return the values of the integers of `input`, differentiable."""
    dtype = compute_dtype(input, quant_min, quant_max)
    grid = make_grid(input, scale, zero_point, axis, group_size, dtype)
    arguments = input, *grid, quant_min, quant_max, pass_clipped_gradient
    if transforms_run():  # in which tensors do not say whether a gradient is wanted
        return apply_to_parts(_TransformedStraightThrough, *arguments)[0]
    if torch.is_grad_enabled() and input.requires_grad:
        return apply(_StraightThrough, *arguments)
    code = _steps(input, grid).add_(grid.zero_point).clamp_(quant_min, quant_max)
    return _rounded(_values(code, grid), input.dtype)


class _StraightThrough(torch.autograd.Function):
    """Of (input, *grid, quant_min, quant_max, pass_clipped_gradient)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        values, clipped = _values_and_clipped(*arguments)
        if clipped is not None:
            ctx.save_for_backward(clipped)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _unclipped(ctx, gradient), *[None] * 6


class _TransformedStraightThrough(torch.autograd.Function):
    """The same for torch.func and forward mode.

    A function of its own: what has a rule for them takes longer to call than to quantize a small
    tensor.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        return _values_and_clipped(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        clipped = output[1]
        if clipped is not None:
            ctx.mark_non_differentiable(clipped)
            ctx.save_for_backward(clipped)
            ctx.save_for_forward(clipped)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return _unclipped(ctx, gradient), *[None] * 6

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        return _unclipped(ctx, tangent), None


def _values_and_clipped(
    input: Tensor,
    inverse_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    pass_clipped_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the values of the integers, and which elements have no gradient; None if all have."""
    grid = Grid(inverse_scale, scale, zero_point)
    unclipped = _steps(input, grid).add_(zero_point)
    if not pass_clipped_gradient and _are_within(unclipped, quant_min, quant_max):
        return _rounded(_values(unclipped, grid), input.dtype), None
    code = unclipped.clamp(quant_min, quant_max)
    clipped = None if pass_clipped_gradient else _differ(unclipped, code)
    return _rounded(_values(code, grid), input.dtype), clipped


def _are_within(unclipped: Tensor, quant_min: int, quant_max: int) -> bool:
    """Return whether no number lies outside of the range, where asking is cheap; NaN does.

    It is on CPUs: cheaper than to clip, to compare and to keep a byte for each element. For an
    accelerator one would have to wait, and what is compiled or transformed has no numbers yet.
    """
    has_numbers = type(unclipped) is Tensor and unclipped.is_cpu and unclipped.numel() > 0
    if not has_numbers or torch.compiler.is_compiling() or transforms_run():
        return False
    lowest, highest = extremes(unclipped)
    return quant_min <= lowest.item() and highest.item() <= quant_max


def _differ(left: Tensor, right: Tensor) -> Tensor:
    """Return where numbers of `left` are not those of `right`, which are finite; bool."""
    # Comparing is not done by vector instructions on CPUs, both of these are.
    return torch.sub(left, right).to(torch.bool) if left.is_cpu else left != right


def _unclipped(ctx: Any, gradient: Tensor) -> Tensor:
    # Read once: activation checkpointing unpacks each saved tensor a single time.
    saved = ctx.saved_tensors
    # Not a product: zero times an infinite gradient would be NaN.
    return torch.where(saved[0], 0.0, gradient) if saved else gradient


def is_clipped(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Return where the rounded input lies outside of the range (NaN too): bool, as `input`."""
    dtype = compute_dtype(input, quant_min, quant_max)
    grid = make_grid(input, scale, zero_point, axis, group_size, dtype)
    unclipped = _steps(input, grid).add_(grid.zero_point)
    return _differ(unclipped, unclipped.clamp(quant_min, quant_max))


def _steps(input: Tensor, grid: Grid) -> Tensor:
    """Return round(input / scale) as a new tensor in the dtype of the computation."""
    return (input.to(grid.scale.dtype) * grid.inverse_scale).round_()


def _values(code: Tensor, grid: Grid) -> Tensor:
    """Return the real numbers of integers held in floating point, which are overwritten."""
    shifted = code.sub_(grid.zero_point)
    # Compiled by torch 2.11, an autograd function that returns what was changed in place has a
    # gradient of zero.
    return shifted * grid.scale if torch.compiler.is_compiling() else shifted.mul_(grid.scale)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values` in `dtype`, cut to its largest number; they are changed in place."""
    if dtype == values.dtype:
        return values
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(values.dtype).max:
        values = values.clamp_(-largest, largest)
    return values.to(dtype)
