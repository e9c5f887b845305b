"""Checking the lines of a graph against one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compression_manager.errors import QuantizationError
from compression_manager.quantization.graph.operations import Operation
from compression_manager.quantization.graph.shape_rules import SHAPE_RULES

_SOURCES = ("Input", "Parameter", "Buffer", "Constant")
_UNARY = [
    "FakeQuantize",
    "Quantize",
    "Dequantize",
    "Relu",
    "Relu6",
    "Gelu",
    "Silu",
    "Sigmoid",
    "Tanh",
    "Softmax",
    "LogSoftmax",
    "Hardswish",
    "Hardsigmoid",
    "LeakyRelu",
    "Elu",
    "Neg",
    "Abs",
    "Exp",
    "Log",
    "Sqrt",
    "Rsqrt",
    "Dropout",
    "Reshape",
    "View",
    "Flatten",
    "Transpose",
    "Permute",
    "Squeeze",
    "Unsqueeze",
    "Cast",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
]
# With a number in place of a tensor, a binary operation reads one tensor.
_BINARY = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "FloorDivide",
    "Remainder",
    "Pow",
    "Maximum",
    "Minimum",
    "Gt",
    "Ge",
    "Lt",
    "Le",
    "Eq",
    "Ne",
]
_WITH_WEIGHT = [
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
]

# Kind -> least and greatest number of tensors that it reads; kinds not listed read any number.
_NUMBER_OF_INPUTS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_SOURCES, (0, 0)),
    **dict.fromkeys(_UNARY, (1, 1)),
    **dict.fromkeys(_BINARY, (1, 2)),
    **dict.fromkeys(_WITH_WEIGHT, (2, 3)),
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), (1, 5)),
    **dict.fromkeys(("LayerNorm", "GroupNorm"), (1, 3)),
    "MatMul": (2, 2),
    "Addmm": (3, 3),
    "Embedding": (2, 2),
    "ScaledDotProductAttention": (3, 4),
}


def validate_operations(operations: Sequence[Operation], output_ids: Iterable[int]) -> None:
    """Raise QuantizationError at the first line that is wrong; its text names the line."""
    defined: dict[int, Operation] = {}
    for number, operation in enumerate(operations, start=1):
        try:
            _check(operation, defined)
        except QuantizationError as error:
            raise QuantizationError(f"line {number}, {error}") from error
        defined[operation.output_id] = operation
    for output_id in output_ids:
        if output_id not in defined:
            raise QuantizationError(f"the model's output t{output_id} is defined by no line.")


def _check(operation: Operation, defined: dict[int, Operation]) -> None:
    operation.validate()
    if operation.output_id in defined:
        first = defined[operation.output_id]
        raise operation.error(f"t{operation.output_id} is defined before, by `{first}`.")
    for number in operation.input_ids:
        if number not in defined:
            raise operation.error(f"t{number} is used before any line defines it.")
    count = len(operation.input_ids)
    low, high = _NUMBER_OF_INPUTS.get(operation.kind, (0, count))
    if not low <= count <= high:
        valid = str(low) if low == high else f"{low} to {high}"
        raise operation.error(f"{operation.kind} reads {valid} tensors, got {count}.")
    rule = SHAPE_RULES.get(operation.kind)
    if rule is not None:
        rule(operation, [defined[number] for number in operation.input_ids])
