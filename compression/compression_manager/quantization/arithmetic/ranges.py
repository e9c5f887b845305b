"""Smallest and largest values of a tensor, one pair for each scale of a scheme."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.exporting import is_exporting
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.tensors.memory_format import in_memory_order, is_dense


def range_shape(scheme: QuantizationScheme, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor of shape `shape`.

    () per tensor, (channels,) per channel, (rows, groups) per group with rows = shape[0],
    (*shape[:-1], 1) per token.

    Raises:
        QuantizationError: the tensor lacks the scheme's axis.
    """
    if scheme.granularity == "tensor":
        return ()
    if scheme.axis is not None:
        if not -len(shape) <= scheme.axis < len(shape):
            raise QuantizationError(
                f"axis {scheme.axis} does not exist in a tensor of shape {tuple(shape)}."
            )
        return (shape[scheme.axis],)
    if not shape:
        raise QuantizationError(
            f"granularity '{scheme.granularity}' needs a tensor of at least one dimension."
        )
    if scheme.group_size is not None:
        return group_shape(shape, scheme.group_size)
    return (*shape[:-1], 1)


def group_shape(shape: Sequence[int], group_size: int) -> tuple[int, int]:
    """Return (rows, groups per row) of a tensor; the last group of a row may be shorter."""
    length = 1
    for size in shape[1:]:
        length *= size
    return shape[0], -(-length // group_size)


def tensor_range(input: Tensor, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
    """Return (minimum, maximum) of `input` alone.

    Args:
        input: floating point, any shape that has the scheme's axis.

    Returns:
        Two float32 tensors in the shape of the scales (`range_shape`), without gradient; NaN
        where there is any NaN, zeros for an empty tensor.

    Raises:
        QuantizationError: the tensor lacks the scheme's axis.
    """
    input = input.detach()
    shape = range_shape(scheme, input.shape)
    if input.numel() == 0:
        zeros = torch.zeros(shape, dtype=torch.float32, device=input.device)
        return zeros, zeros.clone()
    low, high = _ends(input, scheme, shape)
    return low.to(torch.float32), high.to(torch.float32)


def extremes(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return (minimum, maximum) of all elements, at least one; NaN if any is."""
    # aminmax copies a channels_last tensor, but not a vector of its elements.
    return torch.aminmax(in_memory_order(input) if is_dense(input) else input)


def _ends(
    input: Tensor, scheme: QuantizationScheme, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    if scheme.granularity == "tensor":
        if is_exporting():
            # torch's ONNX exporter knows neither aminmax nor amin without a dimension.
            flat = input.reshape(-1)
            return flat.amin(0), flat.amax(0)
        return torch.aminmax(input) if torch.compiler.is_compiling() else extremes(input)
    # One pass each is many times faster than torch.aminmax along a dimension.
    if scheme.granularity == "token":
        return input.amin(-1, keepdim=True), input.amax(-1, keepdim=True)
    if scheme.group_size is not None:
        groups = _in_groups(input, scheme.group_size, shape)
        return groups.amin(-1), groups.amax(-1)
    axis = (scheme.axis or 0) % input.dim()
    others = [dim for dim in range(input.dim()) if dim != axis]
    return (input.amin(others), input.amax(others)) if others else (input, input)


def _in_groups(input: Tensor, group_size: int, shape: tuple[int, ...]) -> Tensor:
    """Return (rows, groups, group_size); a shorter last group repeats its last value."""
    rows, groups = shape
    flat = input.reshape(rows, -1)
    missing = groups * group_size - flat.shape[1]
    if missing:
        # Not F.pad: CUDA's kernel for replicating takes a limited number of rows.
        flat = torch.cat([flat, flat[:, -1:].expand(-1, missing)], 1)
    return flat.reshape(rows, groups, group_size)
