"""Functions that a model keeps as attributes, such as a wrapped `forward`, made for its copy.

`copy.deepcopy` shares functions. A decorator or `torch.compile` around a bound method keeps the
model that it was made for in its closure, so that a copy would go on calling the original.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

# What every module has: parameters, children, hooks.
_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_NOTHING = object()


class Rebinding:
    """The functions of one model that hold on to it, and those that its copy gets instead.

    Args:
        model: the original.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {id(module) for module in model.modules()}
        attributes = [
            value
            for module in model.modules()
            for key, value in vars(module).items()
            if key not in _OF_ALL_MODULES
        ]
        self._functions = {
            id(item): item
            for value in attributes
            for item in _reachable(value)
            if isinstance(item, FunctionType) and self._refers(item)
        }

    def begin(self, memo: dict[int, Any]) -> None:
        """Let `copy.deepcopy` with this memo take functions of the copy's own, still unfinished."""
        memo.update((key, _unfinished(function)) for key, function in self._functions.items())

    def finish(self, memo: dict[int, Any]) -> None:
        """Give these functions what they hold on to, now that the copy is there.

        Raises:
            Exception: what cannot be copied raises.
        """
        for key, function in self._functions.items():
            for cell, value in zip(memo[key].__closure__, _held_by(function), strict=True):
                if value is not _NOTHING:
                    cell.cell_contents = (
                        copy.deepcopy(value, memo) if self._refers(value) else value
                    )

    def _refers(self, value: Any) -> bool:
        """Return whether `value` leads to a module of the model."""
        return any(id(item) in self._own for item in _reachable(value))


def _reachable(value: Any) -> Iterator[Any]:
    """Yield `value` and what it holds on to, up to modules."""
    waiting, seen = [value], set[int]()
    while waiting:
        item = waiting.pop()
        if id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting += _held_by(item)


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, (nn.Module, type)):
        return []
    if isinstance(value, FunctionType):
        compiled = _compiled_from(value)
        return [compiled] if compiled is not None else list(map(_content, value.__closure__ or ()))
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if callable(value) and hasattr(value, "__dict__"):
        return list(vars(value).values())
    return []


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _NOTHING


def _compiled_from(function: FunctionType) -> Any:
    """Return what torch.compile made `function` of, whose own cells cannot be copied; or None."""
    # functools.wraps copies the attribute to what others wrap around it.
    is_compilers = str(function.__globals__.get("__name__")).startswith("torch._dynamo")
    return vars(function).get("_torchdynamo_orig_callable") if is_compilers else None


def _unfinished(function: FunctionType) -> FunctionType:
    """Return what computes as `function` does, once its cells hold what `_held_by` returns."""
    if _compiled_from(function) is not None:
        function = _caller_of(None)
    made = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(CellType() for _ in function.__closure__ or ()),
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _caller_of(target: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    return call
