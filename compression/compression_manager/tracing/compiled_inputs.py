"""Calling compiled code, which takes its inputs to be what its examples were and asks nobody."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from compression_manager.errors import ConfigError
from compression_manager.tracing.program import batch_size, is_batch


def described_examples(program: ExportedProgram) -> str:
    """Return what the example inputs of a program are, for `called_as_examples`.

    JSON: how the arguments are nested, and for each value within them the path that leads there,
    with a tensor's dtype; shape, with "batch" for the open size; and axes, that of the longest
    steps in memory first. All other values are written as `repr` gives them.
    """
    inputs: Any = program.example_inputs or ((), {})
    leaves, structure = tree_flatten_with_path(inputs)
    samples = batch_size(inputs)
    examples = [{"path": _place(path), **_described(leaf, samples)} for path, leaf in leaves]
    return json.dumps({"structure": treespec_dumps(structure), "examples": examples})


def called_as_examples(run: Callable[..., Any], description: str) -> Callable[..., Any]:
    """Return `run`, called with what it is given in the order and the layout of the examples.

    Mappings may have their entries in any order, and tensors any layout in memory: they are
    copied if need be.

    Args:
        run: the compiled code.
        description: what `described_examples` returned.

    Returns:
        A function that raises ConfigError for other arguments than the examples had: a tensor of
        another dtype or shape, or another value that is no tensor.
    """
    document = json.loads(description)
    structure = treespec_loads(document["structure"])
    examples: list[Mapping[str, Any]] = document["examples"]

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = tree_flatten_with_path((args, kwargs))
        given = {_place(path): leaf for path, leaf in leaves if leaf is not None}
        prepared = [_as_example(given.pop(item["path"], None), item) for item in examples]
        if given:
            raise ConfigError(
                f"this package takes no {' and no '.join(given)}; it was exported with "
                f"{', '.join(item['path'] for item in examples)}."
            )
        args, kwargs = tree_unflatten(prepared, structure)
        return run(*args, **kwargs)

    return call


def _place(path: tuple[Any, ...]) -> str:
    """Return how Python names a value within (args, kwargs), such as args[1]['mask']."""
    return f"{'kwargs' if path[0].idx else 'args'}{keystr(path[1:])}"


def _described(leaf: Any, samples: int) -> dict[str, Any]:
    if not isinstance(leaf, Tensor):
        return {"value": repr(leaf)}
    shape: list[int | str] = list(leaf.shape)
    if is_batch(leaf, samples):
        shape[0] = "batch"
    axes = sorted(range(leaf.dim()), key=leaf.stride, reverse=True)
    return {"dtype": _name(leaf), "shape": shape, "axes": axes}


def _as_example(leaf: Any, example: Mapping[str, Any]) -> Any:
    """Return `leaf`, laid out as its example was.

    Raises:
        ConfigError: it is something else.
    """
    if "value" in example:
        fits = repr(leaf) == example["value"]
        expected = example["value"]
    else:
        fits = isinstance(leaf, Tensor) and _has_shape(leaf, example)
        expected = f"a tensor of {example['dtype']} ({', '.join(map(str, example['shape']))})"
    if not fits:
        found = f"{_name(leaf)} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
        raise ConfigError(
            f"this package was compiled for {expected} as {example['path']}, got {found}; export "
            "it with such inputs, or convert them."
        )
    return _laid_out(leaf, example["axes"]) if isinstance(leaf, Tensor) else leaf


def _has_shape(tensor: Tensor, example: Mapping[str, Any]) -> bool:
    shape = example["shape"]
    return (
        _name(tensor) == example["dtype"]
        and len(shape) == tensor.dim()
        and all(wanted in ("batch", size) for wanted, size in zip(shape, tensor.shape, strict=True))
    )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _laid_out(tensor: Tensor, axes: list[int]) -> Tensor:
    ordered = tensor.permute(axes)
    if ordered.is_contiguous():
        return tensor
    return ordered.contiguous().permute([axes.index(axis) for axis in range(len(axes))])
