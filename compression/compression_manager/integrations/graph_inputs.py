"""Calling a runtime whose inputs are named tensors as a model is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from compression_manager.errors import ConfigError

# numpy arrays, which the runtimes bring along; this package does without.
Array = Any
Feed = Mapping[str, Array]


@dataclass(frozen=True)
class _Leaf:
    """A value within the arguments.

    Attributes:
        path: parameter, keys and indices that lead there; a parameter given by position is "".
        in_mapping: whether a mapping holds it, whose entries come in any order.
    """

    path: tuple[str, ...]
    value: Any
    in_mapping: bool


def called_as_model(
    names: Sequence[str], compute: Callable[[Feed], Sequence[Array]]
) -> Callable[..., Any]:
    """Return a function of the model's arguments to its output tensor, or the tuple of them.

    Tensors that are given by position are taken in order, those by keyword and in mappings by name.

    Args:
        names: of the inputs, in order; torch joins what leads to a nested tensor with "_".
        compute: the runtime; returns arrays that it does not use again.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = compute({name: _array(value) for name, value in _named(names, args, kwargs)})
        tensors = tuple(torch.from_numpy(output) for output in outputs)
        return tensors[0] if len(tensors) == 1 else tensors

    return run


def constants_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments, and what they hold, that are neither tensors nor None."""
    leaves = _leaves_of(args, kwargs)
    return [leaf.value for leaf in leaves if not isinstance(leaf.value, Tensor)]


def without_constants(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let what `called_as_model` returned be called with the constants of the examples as well."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_none_for_constants, (args, kwargs))
        return run(*args, **kwargs)

    return call


def _none_for_constants(leaf: Any) -> Any:
    return None if isinstance(leaf, (bool, int, float, complex, str, bytes)) else leaf


def _leaves_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[_Leaf]:
    arguments = [*(("", value) for value in args), *kwargs.items()]
    return [leaf for name, value in arguments for leaf in _leaves(value, (name,), False)]


def _leaves(value: Any, path: tuple[str, ...], in_mapping: bool) -> Iterator[_Leaf]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)), True)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)), in_mapping)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name, None), (*path, field.name), in_mapping)
    elif value is not None:
        yield _Leaf(path, value, in_mapping)


def _named(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Tensor]]:
    leaves = _leaves_of(args, kwargs)
    for leaf in leaves:
        if not isinstance(leaf.value, Tensor):
            where = " ".join(filter(None, leaf.path)) or "an argument"
            raise ConfigError(
                f"the exported model takes tensors only, got {leaf.value!r} as {where}; what is no "
                "tensor is fixed when the model is exported."
            )
    given: dict[str, Tensor] = {}
    positional = []
    for leaf in leaves:
        name = _name_of(leaf, [name for name in names if name not in given])
        if name is None:
            positional.append(leaf.value)
        else:
            given[name] = leaf.value
    rest = [name for name in names if name not in given]
    if len(rest) != len(positional):
        raise ConfigError(
            f"the exported model takes the tensors {', '.join(names)}; got {len(positional)} by "
            f"position and {', '.join(kwargs) or 'none'} by name."
        )
    return [*zip(rest, positional, strict=True), *given.items()]


def _name_of(leaf: _Leaf, names: Sequence[str]) -> str | None:
    """Return which input a tensor is, as far as what leads to it tells."""
    parameter, *inner = leaf.path
    known = re.sub(r"[^A-Za-z0-9]+", "_", "_".join([parameter, *inner] if parameter else inner))
    if parameter:
        return known if known in names else None
    if not leaf.in_mapping:
        return None
    ending = [name for name in names if name.endswith(f"_{known}")]
    return ending[0] if len(ending) == 1 else None


def _array(value: Tensor) -> Array:
    return value.detach().cpu().numpy()
