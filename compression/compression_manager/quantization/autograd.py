"""What torch's autograd leaves to be said: the types of its functions, and where it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from compression_manager.errors import QuantizationError

Gradients = tuple[Tensor | None, ...]


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Return `function.apply(*arguments)` of a function that returns one tensor."""
    call = cast(Callable[..., Tensor], function.apply)
    return call(*arguments)


def apply_to_parts(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Tensor, ...]:
    """Return `function.apply(*arguments)` of a function that returns a tuple of tensors."""
    call = cast(Callable[..., tuple[Tensor, ...]], function.apply)
    return call(*arguments)


def differentiable_once(
    backward: Callable[..., Gradients], *, has_constant_factor: bool = False
) -> Callable[..., Gradients]:
    """Make the `backward` of a function refuse batched gradients, and to be differentiated itself.

    As torch's `once_differentiable`, with an error that says what to do; and also where the
    incoming gradient is a constant, as that of the output is in a gradient penalty, because what
    it is multiplied by is none.

    Args:
        backward: of a `torch.autograd.Function`.
        has_constant_factor: whether it is one, as for activations and sums, so that only the
            gradient can be differentiated.
    """

    @wraps(backward)
    def once(ctx: Any, *gradients: Tensor) -> Gradients:
        if any(torch._C._functorch.is_legacy_batchedtensor(item) for item in gradients):
            raise QuantizationError(
                "an integer layer, or a ReLU beside it, got many gradients at once "
                "(is_grads_batched, or a vectorized jacobian), of which it computes one at a time; "
                'use QATConfig(forward="fake").'
            )
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if has_constant_factor and not any(item.requires_grad for item in gradients):
            return results
        leaves = [None if item is None else item.detach().requires_grad_() for item in results]
        return cast(Gradients, cast(Any, _Refused).apply(*leaves))

    return once


class _Refused(torch.autograd.Function):
    """The identity, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor | None) -> Gradients:
        return tuple(None if item is None else item.view_as(item) for item in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        raise QuantizationError(
            "an integer layer, or a ReLU beside it, was differentiated twice (create_graph=True), "
            'which it cannot be; use QATConfig(forward="fake").'
        )


def runs_backward() -> bool:
    """Return whether a backward pass is under way, as in a forward pass that it repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def transforms_run() -> bool:
    """Return whether torch.func transforms, or forward mode differentiates, what is computed."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
