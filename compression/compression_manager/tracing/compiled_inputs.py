"""Calling what takes its inputs to be what its examples were, whether it asks or does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
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
from compression_manager.tracing.input_sizes import (
    BATCH,
    has_sizes,
    require_equal_samples,
    sizes_of_inputs,
    words_of_sizes,
)


def described_examples(program: ExportedProgram) -> str:
    """Return what the example inputs of a program are, for `called_as_examples`.

    JSON: how the arguments are nested, and for each value within them the path that leads there,
    with a tensor's dtype; shape, with "batch" for the open size; and axes, that of the longest
    steps in memory first. All other values are written as `repr` gives them.
    """
    inputs: Any = program.example_inputs or ((), {})
    leaves, structure = tree_flatten_with_path(inputs)
    sizes = iter(sizes_of_inputs(program))
    examples = [{"path": _place(path), **_described(leaf, sizes)} for path, leaf in leaves]
    return json.dumps({"structure": treespec_dumps(structure), "examples": examples})


def called_as_examples(run: Callable[..., Any], description: str) -> Callable[..., Any]:
    """Return `run`, called with what it is given in the order and the layout of the examples.

    Mappings may have their entries in any order, and tensors any layout in memory: they are
    copied if need be.

    Args:
        run: the code.
        description: what `described_examples` returned.

    Returns:
        A function that raises ConfigError for other arguments than the examples had: a tensor of
        another dtype or shape, different numbers of samples, or another value that is no tensor.
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
                f"this file takes no {' and no '.join(given)}; it was exported with "
                f"{', '.join(item['path'] for item in examples)}."
            )
        pairs = zip(examples, prepared, strict=True)
        require_equal_samples({item["path"]: len(leaf) for item, leaf in pairs if _is_open(item)})
        args, kwargs = tree_unflatten(prepared, structure)
        return run(*args, **kwargs)

    return call


def _place(path: tuple[Any, ...]) -> str:
    """Return how Python names a value within (args, kwargs), such as args[1]['mask']."""
    return f"{'kwargs' if path[0].idx else 'args'}{keystr(path[1:])}"


def _described(leaf: Any, sizes: Iterator[list[int | str]]) -> dict[str, Any]:
    if not isinstance(leaf, Tensor):
        return {"value": repr(leaf)}
    axes = sorted(range(leaf.dim()), key=leaf.stride, reverse=True)
    return {"dtype": _name(leaf), "shape": next(sizes), "axes": axes}


def _is_open(example: Mapping[str, Any]) -> bool:
    return BATCH in example.get("shape", ())


def _as_example(leaf: Any, example: Mapping[str, Any]) -> Any:
    """Return `leaf`, laid out as its example was.

    Raises:
        ConfigError: it is something else.
    """
    if "value" in example:
        fits = repr(leaf) == example["value"]
        expected = example["value"]
    else:
        fits = isinstance(leaf, Tensor) and _name(leaf) == example["dtype"]
        fits = fits and has_sizes(leaf, example["shape"])
        expected = f"a tensor of {example['dtype']} {words_of_sizes(example['shape'])}"
    if not fits:
        found = f"{_name(leaf)} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
        raise ConfigError(
            f"this file was exported with {expected} as {example['path']}, got {found}; export "
            "it with such inputs, or convert them."
        )
    return _laid_out(leaf, example["axes"]) if isinstance(leaf, Tensor) else leaf


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _laid_out(tensor: Tensor, axes: list[int]) -> Tensor:
    ordered = tensor.permute(axes)
    if ordered.is_contiguous():
        return tensor
    return ordered.contiguous().permute([axes.index(axis) for axis in range(len(axes))])
