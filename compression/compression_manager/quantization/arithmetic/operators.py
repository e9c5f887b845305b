"""The arithmetic as operators `torch.ops.compression_manager.*`, for torch.export.

Each computes what the function of the same name in `kernels` does. `fake_quantize` has the same
gradient; it keeps the input for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compression_manager.quantization.arithmetic import kernels
from compression_manager.quantization.scheme import storage_dtype


@torch.library.custom_op("compression_manager::quantize", mutates_args=())
def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Return `kernels.quantize` of the same arguments."""
    return kernels.quantize(input, scale, zero_point, quant_min, quant_max, axis, group_size)


@torch.library.custom_op("compression_manager::dequantize", mutates_args=())
def dequantize(
    quantized: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `kernels.dequantize` of the same arguments."""
    return kernels.dequantize(quantized, scale, zero_point, axis, group_size, dtype)


@torch.library.custom_op("compression_manager::fake_quantize", mutates_args=())
def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
    pass_clipped_gradient: bool = False,
) -> Tensor:
    """Return `kernels.fake_quantize` of the same arguments."""
    return kernels.fake_quantize(
        input,
        scale,
        zero_point,
        quant_min,
        quant_max,
        axis,
        group_size,
        pass_clipped_gradient,
    )


@quantize.register_fake
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    return torch.empty_like(input, dtype=storage_dtype(quant_min, quant_max))


@dequantize.register_fake
def _(
    quantized: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return torch.empty_like(quantized, dtype=dtype)


@fake_quantize.register_fake
def _(input: Tensor, *parameters: object, **options: object) -> Tensor:
    return torch.empty_like(input)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, scale, zero_point, *limits, pass_clipped_gradient = inputs
    ctx.limits = limits
    if not pass_clipped_gradient:
        ctx.save_for_backward(input, scale, zero_point)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once, as activation checkpointing demands
    if saved:
        clipped = kernels.is_clipped(*saved, *ctx.limits)
        gradient = torch.where(clipped, 0.0, gradient)
    return gradient, None, None, None, None, None, None, None


fake_quantize.register_autograd(_straight_through, setup_context=_keep_for_backward)
