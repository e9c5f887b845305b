"""Sizes of the tensors that a graph takes: those of its examples, but for the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from compression_manager.errors import ConfigError

# Stands for the number of samples, which is open and the same in all inputs.
BATCH = "batch"
Sizes = Sequence[int | str]


def names_of_inputs(program: ExportedProgram) -> list[str]:
    """Return the name of each tensor that the user gives, in order."""
    return [
        item.arg.name
        for item in program.graph_signature.input_specs
        if item.kind is InputKind.USER_INPUT and isinstance(item.arg, TensorArgument)
    ]


def sizes_of_inputs(program: ExportedProgram) -> list[list[int | str]]:
    """Return the sizes of each tensor that the user gives, in order."""
    value = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    return [
        [size if isinstance(size, int) else BATCH for size in value[name].shape]
        for name in names_of_inputs(program)
    ]


def has_sizes(tensor: Tensor, sizes: Sizes) -> bool:
    """Return whether a tensor has these sizes, with any number of samples."""
    return len(sizes) == tensor.dim() and all(
        wanted in (BATCH, size) for wanted, size in zip(sizes, tensor.shape, strict=True)
    )


def words_of_sizes(sizes: Sizes) -> str:
    """Return sizes as `str` gives those of a tensor."""
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def require_equal_samples(counts: Mapping[str, int]) -> None:
    """Raise ConfigError unless all inputs hold equally many samples.

    A graph reads the number from one of them and counts on it in all others.

    Args:
        counts: input -> number of its samples.
    """
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"inputs {' and '.join(map(repr, counts))} must hold equally many samples, as in the "
            "examples that the file was exported with, got "
            f"{' and '.join(map(str, counts.values()))}."
        )
