"""Fake quantization whose scale and zero point get a gradient.

Forward is `compression_manager.quantization.fake_quantize`, so that training computes with the
integers that conversion stores. With v = x / s, integers from n to p, and zero point z:

    y = (clamp(round(v) + z, n, p) - z) * s

    n <= v + z <= p    dy/ds = round(v) - v     dy/dz = 0      dy/dx = 1
    v + z < n          dy/ds = n - z            dy/dz = -s     dy/dx = 0
    v + z > p          dy/ds = p - z            dy/dz = -s     dy/dx = 0

What is less than half a step beyond an end rounds to the end, and is outside all the same. An end
itself is inside, unlike in the papers: the zeros that a ReLU returns must not move the zero point.
With z = 0 this is LSQ (Esser et al., 2020, arXiv:1902.08153, eq. 3 and 5). With the real offset
b = -z * s in place of z it is LSQ+ (Bhalgat et al., 2020, arXiv:2004.09576, section 3.1), where
outside of the range dy/ds at a fixed offset is n or p and dy/db is 1.

What the optimizer changes are the logarithm of the scale and the share of the range that lies
below zero. Both are free of units, so that one learning rate fits inputs of any magnitude and 2
as well as 8 bits. On the scale itself, a step of Adam that suits 2 bits is larger than an 8-bit
scale; and dividing the gradient so that gradient descent moves the scale by LSQ's own step
diverged with SGD where the scale was small.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization import QuantizationScheme, fake_quantize
from compression_manager.quantization.arithmetic.grid import compute_dtype, make_grid
from compression_manager.quantization.autograd import apply, transforms_run
from compression_manager.quantization.exporting import is_exporting


def learned_fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    *,
    gradient_factor: float = 1.0,
) -> Tensor:
    """Return `input` fake-quantized, with the gradients of this module's table.

    Args:
        input: floating point, any shape.
        scale: float32, positive, in the shape of the scheme's scales: (), (channels,) or
            (rows, groups).
        zero_point: float32 with integer values from quant_min to quant_max, shape of `scale`.
        scheme: range of integers and granularity.
        gradient_factor: multiplies the gradients of scale and zero point (LSQ's g).

    Returns:
        Shape and dtype of `input`. NaN stays NaN and contributes to no gradient.
    """
    if not torch.is_grad_enabled() or is_exporting():
        return _quantized(input, scale, zero_point, scheme)
    return apply(_LearnedScale, input, scale, zero_point, scheme, gradient_factor)


def refuse_transforms() -> None:
    """Refuse what the functions of this module have no rules for.

    Raises:
        QuantizationError: a transform of torch.func, or forward mode, is active.
    """
    if not torch.compiler.is_compiling() and transforms_run():
        raise QuantizationError(
            "a learned scale is differentiated by backward() alone; torch.func (vmap, grad, jvp) "
            "and forward mode take models that are quantized without the plugin learned_scale."
        )


def sum_per_scale(values: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Return the sums of those elements of `values` that share a scale, in the scales' shape."""
    if scheme.axis is not None:
        axis = scheme.axis % values.dim()
        others = [dim for dim in range(values.dim()) if dim != axis]
        return values.sum(others) if others else values
    if scheme.group_size is not None:
        rows = values.reshape(values.shape[0], -1)
        padded = F.pad(rows, (0, -rows.shape[1] % scheme.group_size))
        return padded.reshape(rows.shape[0], -1, scheme.group_size).sum(-1)
    return values.sum()


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        scheme: QuantizationScheme,
        gradient_factor: float,
    ) -> Tensor:
        ctx.save_for_backward(input, scale, zero_point)
        ctx.scheme = scheme
        ctx.gradient_factor = gradient_factor
        return _quantized(input, scale, zero_point, scheme)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, scale, zero_point = ctx.saved_tensors
        scheme: QuantizationScheme = ctx.scheme
        low, high = scheme.quant_min, scheme.quant_max
        grid = make_grid(
            input,
            scale,
            zero_point,
            scheme.axis,
            scheme.group_size,
            compute_dtype(input, low, high),
        )
        steps = input.to(grid.scale.dtype) * grid.inverse_scale
        position = steps + grid.zero_point
        inside = (position >= low) & (position <= high)
        outside = (position < low) | (position > high)  # neither holds for NaN
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            end = position.clamp(low, high) - grid.zero_point
            slope = torch.where(outside, end, 0.0)
            slope = torch.where(inside, steps.round() - steps, slope)
            grad_scale = _summed(grad_output * slope, scale, scheme, ctx.gradient_factor)
        if ctx.needs_input_grad[2]:
            slope = torch.where(outside, -grid.scale, 0.0)
            grad_zero_point = _summed(grad_output * slope, scale, scheme, ctx.gradient_factor)
        grad_input = torch.where(inside, grad_output, 0.0) if ctx.needs_input_grad[0] else None
        return grad_input, grad_scale, grad_zero_point, None, None


def _quantized(
    input: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme
) -> Tensor:
    output: Tensor = fake_quantize(
        input,
        scale.detach(),
        zero_point.detach().to(torch.int32),
        scheme.quant_min,
        scheme.quant_max,
        scheme.axis,
        group_size=scheme.group_size,
    )
    return output


def _summed(
    values: Tensor, scale: Tensor, scheme: QuantizationScheme, gradient_factor: float
) -> Tensor:
    gradient: Tensor = (sum_per_scale(values, scheme) * gradient_factor).to(scale.dtype)
    return gradient


class PositiveScale(torch.autograd.Function):
    """scale = max(exp(log_scale), minimum): positive whatever the optimizer does.

    Backward is the chain rule, except that at the minimum only gradients that enlarge the scale
    pass, so that it can be left again.
    """

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, minimum: float) -> Tensor:
        """Return the scale; float32, shape of `log_scale`."""
        scale = log_scale.exp().clamp(min=minimum)
        ctx.save_for_backward(scale)
        ctx.minimum = minimum
        return scale

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of `log_scale`."""
        (scale,) = ctx.saved_tensors
        stuck = (scale <= ctx.minimum) & (grad_output > 0)
        return torch.where(stuck, 0.0, grad_output * scale), None


class IntegerZeroPoint(torch.autograd.Function):
    """zero_point = n + round(fraction * (p - n)): where in the range of integers zero lies.

    The fraction is cut to 0 .. 1, so that zero has an integer. Backward is the chain rule, with
    rounding straight-through; at either end only gradients that lead back pass.
    """

    @staticmethod
    def forward(ctx: Any, fraction: Tensor, quant_min: int, quant_max: int) -> Tensor:
        """Return the zero point as float32 with integer values, shape of `fraction`."""
        ctx.save_for_backward(fraction)
        ctx.levels = quant_max - quant_min
        # In float64, where the product cannot round to another integer.
        position = fraction.double().clamp(0.0, 1.0).mul(ctx.levels).round()
        return position.add(quant_min).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of `fraction`."""
        (fraction,) = ctx.saved_tensors
        low, high = fraction <= 0.0, fraction >= 1.0
        stuck = (low & (grad_output > 0)) | (high & (grad_output < 0))
        return torch.where(stuck, 0.0, grad_output * ctx.levels), None, None


class ZeroGradient(torch.autograd.Function):
    """The first argument itself, with a gradient of zero for all others."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *parameters: Tensor | None) -> Tensor:
        """Return `input`."""
        # Not the parameters, which `start` may set before backward.
        ctx.save_for_backward(*(None if p is None else torch.zeros_like(p) for p in parameters))
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of `input` as it is, and zeros."""
        return grad_output, *ctx.saved_tensors
