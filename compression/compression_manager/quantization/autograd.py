"""What torch's autograd leaves to be said: the types of its functions, and where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Return `function.apply(*arguments)` of a function that returns one tensor."""
    call = cast(Callable[..., Tensor], function.apply)
    return call(*arguments)


def apply_to_parts(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Tensor, ...]:
    """Return `function.apply(*arguments)` of a function that returns a tuple of tensors."""
    call = cast(Callable[..., tuple[Tensor, ...]], function.apply)
    return call(*arguments)


def runs_backward() -> bool:
    """Return whether a backward pass is under way, as in a forward pass that it repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
