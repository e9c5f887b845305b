"""Numbers for the tensors of a forward pass, and the lines that define them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from compression_manager.quantization.graph.naming import Call
from compression_manager.quantization.graph.operations import (
    Operation,
    TensorOp,
    format_dtype,
)


class TensorIds:
    """Knows each tensor of the pass by its identity, and keeps it, so that no other takes it.

    Attributes:
        operations: the lines so far.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[tuple[str, Tensor]]) -> None:
        self.operations: list[Operation] = []
        self._ids: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self._pending: dict[int, TensorOp] = {}
        self._names: dict[int, tuple[str, str]] = {}
        for name, parameter in model.named_parameters():
            self._names[id(parameter)] = ("Parameter", name)
        for name, buffer in model.named_buffers():
            self._names[id(buffer)] = ("Buffer", name)
        for name, tensor in inputs:
            self._define("Input", name, tensor)

    def next_id(self) -> int:
        """Return the number that the next line defines."""
        return len(self.operations)

    def id_of(self, tensor: Tensor) -> int:
        """Return the number of `tensor`, defining it if it comes from outside of the pass."""
        known = self._ids.get(id(tensor))
        if known is not None:
            return known
        pending = self._pending.pop(id(tensor), None)
        if pending is not None:
            self.add(replace(pending, output_id=self.next_id()), tensor)
            return self._ids[id(tensor)]
        kind, name = self._names.get(id(tensor), ("Constant", ""))
        return self._define(kind, name, tensor)

    def alias(self, tensor: Tensor, same: Tensor) -> None:
        """Give `tensor` the number of `same`."""
        self._keep(tensor, self.id_of(same))

    def add(self, operation: Operation, output: Tensor) -> None:
        """Append a line that defines `output`; its id is `next_id()`."""
        self.operations.append(operation)
        self._keep(output, operation.output_id)

    def add_call(self, call: Call, outputs: Sequence[Tensor]) -> None:
        """Append the line of `call`; of several outputs each gets its line when it is read."""
        input_ids = tuple(self.id_of(tensor) for tensor in call.tensors)
        for position, output in enumerate(outputs):
            kind = call.kind(output)
            label = call.label(self.id_of, kind)
            if len(outputs) == 1:
                self.add(self._operation(kind, input_ids, output, label, call.attributes()), output)
                continue
            label = ", ".join([*(f"t{number}" for number in input_ids), f"output={position}"])
            self._pending[id(output)] = self._operation(kind, input_ids, output, label, {})
            self._kept.append(output)

    def _define(self, kind: str, name: str, tensor: Tensor) -> int:
        operation = self._operation(kind, (), tensor, name, {})
        self.add(operation, tensor)
        return operation.output_id

    def _operation(
        self,
        kind: str,
        input_ids: tuple[int, ...],
        output: Tensor,
        label: str | None,
        attributes: dict[str, Any],
    ) -> TensorOp:
        return TensorOp(
            kind,
            input_ids,
            self.next_id(),
            tuple(output.shape),
            format_dtype(output.dtype),
            label,
            attributes,
        )

    def _keep(self, tensor: Tensor, number: int) -> None:
        self._ids[id(tensor)] = number
        self._kept.append(tensor)
