"""One line of a graph: an operation, the tensors that it reads and the one that it makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compression_manager.errors import QuantizationError

Shape = tuple[int | None, ...]


class Operation(ABC):
    """What every line of a graph has; `str(operation)` is the line.

    Attributes:
        kind: the operation's name, for example `Linear`.
        input_ids: numbers of the tensors that it reads, in the order of its arguments.
        output_id: number of the tensor that the operation makes: 2 is printed `t2`.
        shape: lengths of that tensor's dimensions, None where unknown; None for no known rank.
        dtype: its element type, for example `Float32` or `Int8`.
    """

    kind: str
    input_ids: tuple[int, ...]
    output_id: int
    shape: Shape | None
    dtype: str

    @abstractmethod
    def arguments(self) -> str:
        """Return what stands between the parentheses of the line."""

    def validate(self) -> None:
        """Check the ids, the shape and the operation's own numbers.

        Raises:
            QuantizationError: names the line and what is wrong with it.
        """
        for number in (self.output_id, *self.input_ids):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise self.error(f"the id {number!r} is not an integer of at least 0.")
        for size in self.shape or ():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
                raise self.error(f"the dimension {size!r} is neither an integer nor None.")
            if size is not None and size < 0:
                raise self.error(f"the dimension {size} is negative; None stands for unknown.")

    def error(self, reason: str) -> QuantizationError:
        """Return the exception that names this line and says `reason`."""
        return QuantizationError(f"`{self}`: {reason}")

    def __str__(self) -> str:
        shape = format_shape(self.shape)
        return f"t{self.output_id} = {self.kind}({self.arguments()}) : {self.dtype} {shape}"


@dataclass(frozen=True, eq=False)
class TensorOp(Operation):
    """Any operation but a fake quantization.

    Attributes:
        kind: for example `Linear`, `Conv2d`, `Add`; `Input`, `Parameter`, `Buffer` and `Constant`
            are where tensors come from, and read none.
        input_ids: numbers of the tensors that it reads.
        output_id: number of the tensor that it makes.
        shape: of that tensor; None or -1 is an unknown dimension, None alone an unknown rank.
        dtype: its element type.
        label: what stands between the parentheses in place of the input ids, for example the
            name of a parameter.
        attributes: numbers that `validate` of the graph needs. Convolutions: `kernel_size`,
            `stride`, `padding`, `dilation` and `groups`, as torch takes them; those left out
            have torch's defaults.
    """

    kind: str
    input_ids: tuple[int, ...]
    output_id: int
    shape: Shape | None
    dtype: str = "Float32"
    label: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", tuple(self.input_ids))
        object.__setattr__(self, "shape", as_shape(self.shape))

    def arguments(self) -> str:
        """Return the input ids, or the label."""
        if self.label is not None:
            return self.label
        return ", ".join(f"t{number}" for number in self.input_ids)


def as_shape(shape: Sequence[int | None] | None) -> Shape | None:
    """Return `shape` as a tuple in which None stands for unknown, as -1 may."""
    return None if shape is None else tuple(None if size == -1 else size for size in shape)


def format_shape(shape: Shape | None) -> str:
    """Return for example `[3, 4]`; `?` is an unknown dimension, or an unknown rank."""
    if shape is None:
        return "?"
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def format_dtype(dtype: torch.dtype) -> str:
    """Return for example `Float32`, `BFloat16`, `UInt8`, `Bool`."""
    name = str(dtype).removeprefix("torch.")
    for prefix, shown in (("bfloat", "BFloat"), ("uint", "UInt")):
        if name.startswith(prefix):
            return shown + name.removeprefix(prefix)
    return name[:1].upper() + name[1:]
