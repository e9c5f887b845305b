"""What the shapes of an operation's inputs and output must have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from compression_manager.quantization.graph.operations import (
    Operation,
    Shape,
    TensorOp,
    format_shape,
)

Rule = Callable[[Operation, Sequence[Operation]], None]


def _differ(left: int | None, right: int | None) -> bool:
    """Return whether two lengths are known and different."""
    return left is not None and right is not None and left != right


def _elements(shape: Shape) -> int | None:
    sizes = [size for size in shape if size is not None]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def _describe(operation: Operation) -> str:
    return f"t{operation.output_id} {format_shape(operation.shape)}"


def _same_shape(operation: Operation, inputs: Sequence[Operation]) -> None:
    before, after = inputs[0].shape, operation.shape
    if before is None or after is None:
        return
    if len(before) != len(after) or any(map(_differ, before, after)):
        raise operation.error(f"the shape differs from that of its input {_describe(inputs[0])}.")


def _preserves_elements(operation: Operation, inputs: Sequence[Operation]) -> None:
    before, after = inputs[0].shape, operation.shape
    if before is None or after is None:
        return
    counts = _elements(before), _elements(after)
    if _differ(*counts):
        raise operation.error(
            f"{counts[1]} elements cannot hold the {counts[0]} of {_describe(inputs[0])}."
        )


def _matrix_product(operation: Operation, inputs: Sequence[Operation]) -> None:
    left, right = inputs[-2:]
    if not left.shape or not right.shape:
        return
    inner = left.shape[-1], right.shape[-2 if len(right.shape) > 1 else -1]
    if _differ(*inner):
        raise operation.error(
            f"inner dimensions {inner[0]} and {inner[1]} of {_describe(left)} and "
            f"{_describe(right)} differ."
        )


def _linear(operation: Operation, inputs: Sequence[Operation]) -> None:
    source, weight = inputs[0], inputs[1]
    if not source.shape or weight.shape is None:
        return
    if len(weight.shape) not in (1, 2):
        raise operation.error(f"the weight {_describe(weight)} is no matrix.")
    if _differ(source.shape[-1], weight.shape[-1]):
        raise operation.error(
            f"inner dimensions {source.shape[-1]} and {weight.shape[-1]} of {_describe(source)} "
            f"and the weight {_describe(weight)} differ."
        )
    if operation.shape and len(weight.shape) == 2 and _differ(operation.shape[-1], weight.shape[0]):
        raise operation.error(f"the weight {_describe(weight)} gives {weight.shape[0]} features.")
    _check_bias(operation, inputs[2:], weight.shape[0])


def _check_bias(operation: Operation, bias: Sequence[Operation], length: int | None) -> None:
    for item in bias:
        if item.shape and _differ(item.shape[-1], length):
            raise operation.error(f"the bias {_describe(item)} is to have {length} values.")


def _convolution(operation: Operation, inputs: Sequence[Operation]) -> None:
    source, weight = inputs[0], inputs[1]
    rank = int(operation.kind[-2])
    kernel = _kernel(operation, weight, rank)
    if source.shape is None or weight.shape is None or kernel is None:
        return
    spatial = _spatial(operation, source, rank)
    channels, per_group = source.shape[-rank - 1], weight.shape[1]
    groups = _attribute(operation, "groups", 1)
    if per_group is not None and _differ(channels, per_group * groups):
        raise operation.error(
            f"{channels} channels of {_describe(source)}, but the weight {_describe(weight)} with "
            f"groups={groups} reads {per_group * groups}."
        )
    _check_bias(operation, inputs[2:], weight.shape[0])
    expected = _output_lengths(operation, source, spatial, kernel)
    _check_output(operation, (weight.shape[0], *expected))


def _transposed_convolution(operation: Operation, inputs: Sequence[Operation]) -> None:
    source, weight = inputs[0], inputs[1]
    rank = int(operation.kind[-2])
    _kernel(operation, weight, rank)
    if source.shape is None or weight.shape is None:
        return
    _spatial(operation, source, rank)
    if _differ(source.shape[-rank - 1], weight.shape[0]):
        raise operation.error(
            f"{source.shape[-rank - 1]} channels of {_describe(source)}, but the weight "
            f"{_describe(weight)} reads {weight.shape[0]}."
        )


def _kernel(operation: Operation, weight: Operation, rank: int) -> Shape | None:
    """Return the kernel's lengths, after comparing the weight with the attribute."""
    stated = _attribute(operation, "kernel_size", None)
    if weight.shape is None:
        return None if stated is None else _per_dimension(stated, rank)
    if len(weight.shape) != rank + 2:
        raise operation.error(
            f"the weight {_describe(weight)} has {len(weight.shape)} dimensions, not {rank + 2}."
        )
    kernel = weight.shape[2:]
    if stated is not None and any(map(_differ, _per_dimension(stated, rank), kernel)):
        raise operation.error(
            f"kernel_size={stated} differs from {format_shape(kernel)} of the weight "
            f"{_describe(weight)}."
        )
    return kernel


def _spatial(operation: Operation, source: Operation, rank: int) -> Shape:
    shape = source.shape or ()
    if len(shape) not in (rank + 1, rank + 2):
        raise operation.error(
            f"the input {_describe(source)} has {len(shape)} dimensions, not {rank + 1} or "
            f"{rank + 2}."
        )
    return shape[-rank:]


def _output_lengths(
    operation: Operation, source: Operation, spatial: Shape, kernel: Shape
) -> Shape:
    """Return the lengths that the convolution gives, as in the formula of `torch.nn.Conv2d`."""
    padding = _attribute(operation, "padding", 0)
    if padding == "same":
        return spatial
    rank = len(kernel)
    lengths: list[int | None] = []
    for size, width, pad, step, gap in zip(
        spatial,
        kernel,
        _per_dimension(0 if padding == "valid" else padding, rank),
        _per_dimension(_attribute(operation, "stride", 1), rank),
        _per_dimension(_attribute(operation, "dilation", 1), rank),
        strict=True,
    ):
        if size is None or width is None:
            lengths.append(None)
            continue
        reach = gap * (width - 1) + 1
        if reach > size + 2 * pad:
            raise operation.error(
                f"a kernel that reaches over {reach} values does not fit {_describe(source)} with "
                f"padding {pad}."
            )
        lengths.append((size + 2 * pad - reach) // step + 1)
    return tuple(lengths)


def _check_output(operation: Operation, expected: Shape) -> None:
    shape = operation.shape
    if shape is None:
        return
    if len(shape) < len(expected) or any(map(_differ, shape[-len(expected) :], expected)):
        raise operation.error(f"its inputs give {format_shape(expected)} for each example.")


def _attribute(operation: Operation, name: str, default: Any) -> Any:
    attributes = operation.attributes if isinstance(operation, TensorOp) else {}
    return attributes.get(name, default)


def _per_dimension(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(value)
    return values * rank if len(values) == 1 else values


SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("FakeQuantize", "Quantize", "Dequantize", "Relu", "Cast"), _same_shape),
    **dict.fromkeys(
        ("Reshape", "View", "Flatten", "Transpose", "Permute", "Squeeze", "Unsqueeze"),
        _preserves_elements,
    ),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), _convolution),
    **dict.fromkeys(
        ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), _transposed_convolution
    ),
    "MatMul": _matrix_product,
    "Addmm": _matrix_product,
    "Linear": _linear,
}
