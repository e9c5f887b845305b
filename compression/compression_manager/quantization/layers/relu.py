"""ReLU that keeps one bit per element for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization.autograd import apply, differentiable_once
from compression_manager.quantization.integer.operands import remember_ends
from compression_manager.quantization.integer.passes import Ends, Passes
from compression_manager.quantization.integer.selection import active_passes, why_reference
from compression_manager.quantization.tensors.memory_format import is_dense, strided_copy


class BitMaskReLU(nn.ReLU):
    """`nn.ReLU` that keeps which elements were positive, where torch keeps its whole output.

    A quantized layer behind it keeps integers of that output, so that otherwise the output would
    be in memory twice. The values and the gradient are those of `nn.ReLU`, to the last bit.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return max(input, 0), in place of the input if `inplace`."""
        if not _keeps_bits(input):
            return super().forward(input)
        found: list[Ends | None] = []
        output = apply(_BitMaskReLU, input, self.inplace, active_passes(), found)
        if found[0] is not None:
            remember_ends(output, found[0])
        return output


def relu(input: Tensor) -> Tensor:
    """Return what `F.relu` does, keeping bits where it can."""
    return cast(Tensor, _RELU(input))


def _keeps_bits(input: Tensor) -> bool:
    return (
        why_reference() is None
        and torch.is_grad_enabled()
        and type(input) is Tensor
        and input.requires_grad
        and input.dtype == torch.float32
        and input.device.type == "cpu"
        and input.numel() > 0
        and is_dense(input)
    )


class _BitMaskReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, inplace: bool, passes: Passes, found: list[Ends | None]
    ) -> Tensor:
        output, positive, ends = passes.relu(input)
        found.append(ends)
        ctx.passes, ctx.stride = passes, input.stride()
        ctx.save_for_backward(positive)
        if inplace:
            ctx.mark_dirty(input)
            return input.copy_(output)
        return output

    @staticmethod
    @partial(differentiable_once, has_constant_factor=True)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (positive,) = ctx.saved_tensors  # read once, as activation checkpointing demands
        if gradient.stride() != ctx.stride:
            # The bits lie in the order of the input in memory.
            gradient = strided_copy(gradient, ctx.stride)
        return cast(Passes, ctx.passes).relu_gradient(gradient, positive), None, None, None


_RELU = BitMaskReLU()

# Layers that hold their activation as an attribute, which may be torch's function.
_HOLDERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def keep_bits(model: nn.Module) -> Callable[[], None]:
    """Let each ReLU of `model` keep bits; return a function that undoes it.

    Modules of exactly the class `nn.ReLU` change their class, and torch's transformer layers that
    hold `F.relu` as their activation get `relu` for it. What calls `F.relu` itself keeps floats.
    """
    modules = [module for module in model.modules() if type(module) is nn.ReLU]
    holders = [
        module
        for module in model.modules()
        if isinstance(module, _HOLDERS) and module.activation is F.relu
    ]
    for module in modules:
        cast(Any, module).__class__ = BitMaskReLU
    for holder in holders:
        cast(Any, holder).activation = relu

    def undo() -> None:
        for module in (*modules, *holders):
            _keep_output(module)

    return undo


def keep_outputs(model: nn.Module) -> None:
    """Make each ReLU of `model` torch's own again."""
    for module in model.modules():
        _keep_output(module)


def _keep_output(module: nn.Module) -> None:
    if type(module) is BitMaskReLU:
        cast(Any, module).__class__ = nn.ReLU
    elif isinstance(module, _HOLDERS) and module.activation is relu:
        cast(Any, module).activation = F.relu
