"""Calling compiled code whose inputs have to lie in memory as its examples did."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path


def layouts_of(program: ExportedProgram) -> str:
    """Return how each example input of a program lies in memory, for `with_layouts`.

    JSON: the place among the arguments -> the axes, that of the longest steps in memory first.
    """
    leaves, _ = tree_flatten_with_path(program.example_inputs or ((), {}))
    return json.dumps(
        {keystr(path): _axes(leaf) for path, leaf in leaves if isinstance(leaf, Tensor)}
    )


def with_layouts(run: Callable[..., Any], layouts: str) -> Callable[..., Any]:
    """Return `run`, called with tensors that lie in memory as `layouts` says: copies if need be."""
    axes: Mapping[str, list[int]] = json.loads(layouts)

    def lay_out(path: Any, leaf: Any) -> Any:
        order = axes.get(keystr(path)) if isinstance(leaf, Tensor) else None
        return leaf if order is None or len(order) != leaf.dim() else _laid_out(leaf, order)

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_with_path(lay_out, (args, kwargs))
        return run(*args, **kwargs)

    return call


def _axes(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _laid_out(tensor: Tensor, axes: list[int]) -> Tensor:
    ordered = tensor.permute(axes)
    if ordered.is_contiguous():
        return tensor
    return ordered.contiguous().permute([axes.index(axis) for axis in range(len(axes))])
