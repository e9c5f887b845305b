"""ReLU that keeps one bit per element for its backward pass."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.selection import active_passes, computes_reference


class BitMaskReLU(nn.ReLU):
    """`nn.ReLU` that keeps which elements were positive, where torch keeps its whole output.

    A quantized layer behind it keeps integers of that output, so that otherwise the output would
    be in memory twice. The values and the gradient are those of `nn.ReLU`, to the last bit.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return max(input, 0), in place of the input if `inplace`."""
        if not _keeps_bits(input):
            return super().forward(input)
        output: Tensor = _BitMaskReLU.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            input, self.inplace, active_passes()
        )
        return output


def _keeps_bits(input: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state() is not None
        and not computes_reference()
        and torch.is_grad_enabled()
        and type(input) is Tensor
        and input.requires_grad
        and input.dtype == torch.float32
        and input.device.type == "cpu"
        and input.numel() > 0
        and _is_dense(input)
    )


def _is_dense(input: Tensor) -> bool:
    return input.is_contiguous() or (
        input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    )


class _BitMaskReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool, passes: Passes) -> Tensor:
        output, positive = passes.relu(input)
        ctx.passes, ctx.format = passes, (input.shape, input.stride())
        ctx.save_for_backward(positive)
        if inplace:
            ctx.mark_dirty(input)
            return input.copy_(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (positive,) = ctx.saved_tensors  # read once, as activation checkpointing demands
        shape, stride = ctx.format
        if gradient.stride() != stride:
            # The bits lie in the order of the input in memory.
            ordered = torch.empty_strided(shape, stride, dtype=gradient.dtype)
            gradient = ordered.copy_(gradient)
        return cast(Passes, ctx.passes).relu_gradient(gradient, positive), None, None


def keep_bits(module: nn.ReLU) -> None:
    """Turn a module of exactly the class `nn.ReLU` into one that keeps bits."""
    module.__class__ = BitMaskReLU


def keep_output(module: nn.ReLU) -> None:
    """Turn it back."""
    module.__class__ = nn.ReLU
