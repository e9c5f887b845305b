"""Scales and zero points, brought into a shape that broadcasts against a tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic.ranges import group_shape
from compression_manager.quantization.scheme import MAX_FLOAT32_BITS


class Grid(NamedTuple):
    """Parameters in the dtype of the computation, shaped to broadcast against the input."""

    inverse_scale: Tensor
    scale: Tensor
    zero_point: Tensor


def compute_dtype(input: Tensor, quant_min: int, quant_max: int) -> torch.dtype:
    """Return float32, or float64 for float64 input and ranges of more than 24 bits.

    Raises:
        QuantizationError: the input is not floating point, or the range is empty.
    """
    if not input.is_floating_point():
        raise QuantizationError(f"only floating-point tensors are quantized, got {input.dtype}.")
    if quant_min >= quant_max:
        raise QuantizationError(
            f"quant_min must be less than quant_max, got {quant_min} and {quant_max}."
        )
    wide = quant_max - quant_min >= 2**MAX_FLOAT32_BITS
    return torch.float64 if wide or input.dtype == torch.float64 else torch.float32


def make_grid(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    dtype: torch.dtype,
) -> Grid:
    """Return the parameters for `input` in `dtype`; shapes as `arithmetic.quantize` takes them.

    Raises:
        QuantizationError: a shape that does not fit.
    """
    if axis is not None and group_size is not None:
        raise QuantizationError(
            f"axis={axis} and group_size={group_size} exclude each other; give one of them."
        )
    if axis is not None and not -input.dim() <= axis < input.dim():
        raise QuantizationError(
            f"axis {axis} does not exist in a tensor of shape {tuple(input.shape)}."
        )
    scale, zero_point = scale.detach().to(torch.float32), zero_point.detach()
    inverse_scale = scale.reciprocal()
    return Grid(
        _broadcast("scale", inverse_scale, input, axis, group_size).to(dtype),
        _broadcast("scale", scale, input, axis, group_size).to(dtype),
        _broadcast("zero_point", zero_point, input, axis, group_size).to(dtype),
    )


def check_numbers(scale: Tensor | float, zero_point: Tensor | int) -> None:
    """Raise QuantizationError for Python numbers that are no scale or zero point.

    Tensors are not looked at: an accelerator would have to wait for it.
    """
    if not isinstance(scale, Tensor) and not (math.isfinite(scale) and scale > 0):
        raise QuantizationError(f"scale is positive and finite, got {scale}.")
    if not isinstance(zero_point, Tensor) and zero_point != int(zero_point):
        raise QuantizationError(f"zero_point is an integer, got {zero_point}.")


def as_tensor(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a scale or zero point as a tensor; a number takes the dtype and device."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=dtype, device=device)


def _broadcast(
    name: str, value: Tensor, input: Tensor, axis: int | None, group_size: int | None
) -> Tensor:
    """Return `value` shaped to broadcast against `input`."""
    if value.dim() == 0:
        return value
    if group_size is not None:
        return _expand_groups(name, value, input, group_size)
    if axis is not None:
        if value.dim() != 1 or value.shape[0] != input.shape[axis]:
            raise _misfit(name, value, input, f"axis {axis} of", (input.shape[axis],))
        shape = [1] * input.dim()
        shape[axis] = -1
        return value.reshape(shape)
    if value.shape == (*input.shape[:-1], 1):
        return value
    if value.numel() == 1:
        return value.reshape(())
    raise QuantizationError(
        f"{name} of shape {tuple(value.shape)} needs an axis or a group size for a tensor of shape "
        f"{tuple(input.shape)}; without one it has a single element, or the shape "
        f"{(*input.shape[:-1], 1)} of one per token."
    )


def _expand_groups(name: str, value: Tensor, input: Tensor, group_size: int) -> Tensor:
    if group_size < 1 or input.dim() == 0:
        raise QuantizationError(
            f"group_size is at least 1, for a tensor of at least one dimension; got {group_size} "
            f"and the shape {tuple(input.shape)}."
        )
    expected = group_shape(input.shape, group_size)
    if tuple(value.shape) != expected:
        raise _misfit(name, value, input, f"groups of {group_size} in", expected)
    rows, groups = expected
    spread = value.unsqueeze(-1).expand(rows, groups, group_size)
    flat = spread.reshape(rows, groups * group_size)
    return flat[:, : input.shape[1:].numel()].reshape(input.shape)


def _misfit(
    name: str, value: Tensor, input: Tensor, where: str, expected: tuple[int, ...]
) -> QuantizationError:
    return QuantizationError(
        f"{name} of shape {tuple(value.shape)} does not fit {where} a tensor of shape "
        f"{tuple(input.shape)}; expected {expected}."
    )
