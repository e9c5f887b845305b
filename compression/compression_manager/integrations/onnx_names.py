"""Names of what an ONNX graph takes and returns; all other values make room for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compression_manager.tracing.graph_outputs import free_name


def name_inputs_and_outputs(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Rename the inputs and the outputs of an `onnx_ir.Graph`, in place.

    Args:
        graph: no value is an input and an output, or two outputs.
        inputs: in order.
        outputs: in order; all names differ.
    """
    wanted = {*inputs, *outputs}
    values = [value for scope in (graph, *graph.subgraphs()) for value in _values(scope)]
    used = {*wanted, *(value.name for value in values)}
    for value in values:
        if value.name in wanted:
            value.name = free_name(value.name, used)
            used.add(value.name)
    named = zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True)
    for value, name in named:
        value.name = name


def _values(scope: Any) -> list[Any]:
    computed = [value for node in scope for value in node.outputs]
    return [*scope.inputs, *scope.initializers.values(), *computed]
