"""What a model returned, put together again from the tensors that a runtime returns in a row.

How they were nested is kept with the file, and each is named by its place in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.utils._pytree import tree_unflatten

from compression_manager.errors import NotExportableError

# Under which name files keep the structure that `named_outputs` returns, as JSON.
OUTPUTS = "compression_manager.outputs"
# Of a tensor that is all that a model returns, and of items of a sequence before their index.
_WHOLE = "output"
_CONSTANTS = (bool, int, float, str, type(None))
# What a graph computes, though the model returned a number.
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def named_outputs(program: ExportedProgram, taken: Collection[str]) -> tuple[list[str], Any]:
    """Return the names of a program's outputs, and their structure, for `restored`.

    Keys of mappings, fields of dataclasses and named tuples, and indices lead to an output; its
    name has a dot between them, and a number behind where another one has it.

    Args:
        program: as it was traced.
        taken: names that no output may have.

    Raises:
        NotExportableError: the model returns something that cannot be kept.
    """
    value = _returned(program)
    is_named = isinstance(value, Mapping) or is_dataclass(value) or hasattr(value, "_fields")
    places: list[str] = []
    structure = _described(value, () if is_named else (_WHOLE,), places)
    used = list(taken)
    for place in places:
        used.append(free_name(place or _WHOLE, used))
    return used[len(taken) :], structure


def restored(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """Return what the model returned, of dicts, lists and tuples.

    Args:
        structure: what `named_outputs` returned, or the same from JSON; None for a file that does
            not know it, of which the tensor is returned, or the tuple of them.
        tensors: outputs, in order.
    """
    if structure is None:
        return tensors[0] if len(tensors) == 1 else tuple(tensors)
    kind, content = structure
    if kind == "output":
        return tensors[content]
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: restored(item, tensors) for key, item in content}
    items = [restored(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def without_constants_returned(program: ExportedProgram) -> None:
    """Let a program return None where it returned another constant, in place.

    The exporter to ONNX leaves out None, and fails at all others.
    """
    node = program.graph.output_node()
    (returned,) = node.args
    assert isinstance(returned, (list, tuple))
    node.args = (tuple(item if isinstance(item, Node) else None for item in returned),)


def free_name(name: str, taken: Collection[str]) -> str:
    """Return `name`, with the first number behind it that makes it none of `taken`."""
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _returned(program: ExportedProgram) -> Any:
    """Return what the model returned, with fake tensors."""
    returned: Any = program.graph.output_node().args[0]
    leaves = [
        item.meta["val"] if isinstance(item, Node) else item
        for spec, item in zip(program.graph_signature.output_specs, returned, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    assert program.call_spec.out_spec is not None  # of a model that was called it never is
    return tree_unflatten(leaves, program.call_spec.out_spec)


def _described(value: Any, path: tuple[str, ...], places: list[str]) -> list[Any]:
    """Return a structure of JSON's values, and append the place of each output to `places`."""
    entries = _entries(value)
    if entries is not None:
        items = [_described(item, (*path, str(key)), places) for key, item in entries]
        if isinstance(value, (list, tuple)):
            return ["list" if isinstance(value, list) else "tuple", items]
        keys = [key if isinstance(key, _CONSTANTS) else str(key) for key, _ in entries]
        return ["dict", [list(entry) for entry in zip(keys, items, strict=True)]]
    if isinstance(value, Tensor):
        places.append(".".join(path))
        return ["output", len(places) - 1]
    if isinstance(value, _CONSTANTS):
        return ["constant", value]
    if isinstance(value, _SYMBOLS):
        raise NotExportableError(
            "the model returns a number that depends on the number of samples, as "
            f"{'.'.join(path)}; return it as a tensor, or export with dynamic_batch=False."
        )
    raise NotExportableError(
        f"the model returns a {type(value).__name__} as {'.'.join(path)}; what ONNX and OpenVINO "
        "return is tensors, numbers, texts and None, in mappings, lists, tuples and dataclasses."
    )


def _entries(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the keys and values of what holds others, or None."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    return None
