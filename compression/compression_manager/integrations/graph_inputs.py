"""Calling a runtime whose inputs are named tensors as a model is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compression_manager.errors import ConfigError
from compression_manager.model_call import tensors_in

# numpy arrays, which the runtimes bring along; this package does without.
Array = Any
Feed = Mapping[str, Array]


def called_as_model(
    names: Sequence[str], compute: Callable[[Feed], Sequence[Array]]
) -> Callable[..., Any]:
    """Return a function of the model's arguments to its output tensor, or the tuple of them.

    Tensors that are given by position are taken in order, those by keyword by name.

    Args:
        names: of the inputs, in order.
        compute: the runtime; returns arrays that it does not use again.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = compute({name: _array(value) for name, value in _named(names, args, kwargs)})
        tensors = tuple(torch.from_numpy(output) for output in outputs)
        return tensors[0] if len(tensors) == 1 else tensors

    return run


def _named(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Tensor]]:
    positional = list(tensors_in(args))
    if kwargs.keys() <= set(names):
        rest = [name for name in names if name not in kwargs]
        given = [(name, kwargs[name]) for name in names if name in kwargs]
    else:
        # Names inside of nested arguments are those that torch made up.
        rest, given = list(names), []
        positional += tensors_in(kwargs)
    if len(rest) != len(positional):
        raise ConfigError(
            f"the exported model takes the tensors {', '.join(names)}; got {len(positional)} by "
            f"position and {', '.join(kwargs) or 'none'} by name."
        )
    return [*zip(rest, positional, strict=True), *given]


def _array(value: Tensor) -> Array:
    return value.detach().cpu().numpy()
