"""Calling compiled code, which takes its inputs to be what its examples were and asks nobody."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path

from compression_manager.deploy.tracing import batch_size, is_batch
from compression_manager.errors import ConfigError


def layouts_of(program: ExportedProgram) -> str:
    """Return what each example input of a program is, for `with_layouts`.

    JSON: the place among the arguments -> dtype; shape, with "batch" for the open size; and the
    axes, that of the longest steps in memory first.
    """
    inputs: Any = program.example_inputs or ((), {})
    leaves, _ = tree_flatten_with_path(inputs)
    samples = batch_size(inputs)
    return json.dumps(
        {
            keystr(path): _described(leaf, samples)
            for path, leaf in leaves
            if isinstance(leaf, Tensor)
        }
    )


def with_layouts(run: Callable[..., Any], layouts: str) -> Callable[..., Any]:
    """Return `run`, called with tensors that lie in memory as `layouts` says: copies if need be.

    What it returns raises ConfigError for a tensor of another dtype or shape.
    """
    expected: Mapping[str, dict[str, Any]] = json.loads(layouts)

    def lay_out(path: Any, leaf: Any) -> Any:
        example = expected.get(keystr(path))
        if example is None or not isinstance(leaf, Tensor):
            return leaf
        _check(leaf, example)
        return _laid_out(leaf, example["axes"])

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_with_path(lay_out, (args, kwargs))
        return run(*args, **kwargs)

    return call


def _described(tensor: Tensor, samples: int) -> dict[str, Any]:
    shape: list[int | str] = list(tensor.shape)
    if is_batch(tensor, samples):
        shape[0] = "batch"
    axes = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return {"dtype": _name(tensor), "shape": shape, "axes": axes}


def _check(tensor: Tensor, example: Mapping[str, Any]) -> None:
    shape = example["shape"]
    fits = len(shape) == tensor.dim() and all(
        wanted in ("batch", size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or _name(tensor) != example["dtype"]:
        sizes = ", ".join(map(str, shape))
        raise ConfigError(
            f"this package was compiled for a tensor of {example['dtype']} ({sizes}), got "
            f"{_name(tensor)} {tuple(tensor.shape)}; export it with such inputs, or convert them."
        )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _laid_out(tensor: Tensor, axes: list[int]) -> Tensor:
    ordered = tensor.permute(axes)
    if ordered.is_contiguous():
        return tensor
    return ordered.contiguous().permute([axes.index(axis) for axis in range(len(axes))])
