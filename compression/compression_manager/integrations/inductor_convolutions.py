"""Which convolutions of a graph stay in float32, because 8-bit kernels fail on them."""

from __future__ import annotations

from typing import Any

import torch

from compression_manager.quantization.integer.geometry import Geometry

CONVOLUTIONS = frozenset(
    getattr(getattr(torch.ops.aten, f"conv{dimensions}d"), overload)
    for dimensions in (1, 2, 3)
    for overload in ("default", "padding")
)


def stays_float(node: Any) -> bool:
    """Return whether a convolution is left to float32 kernels.

    Images of a single channel are contiguous and channels-last at once. With an open batch size,
    Inductor (2.13) then expects a contiguous output from the kernel, which returns channels-last.

    Args:
        node: of one of `CONVOLUTIONS`.
    """
    size = node.args[0].meta["val"].shape
    spatial = [length if isinstance(length, int) else None for length in size[2:]]
    return size[1] == 1 or not all(
        geometry.is_computed_by_onednn(spatial, kernel, depth)
        for geometry, kernel, depth in _geometries(node)
    )


def _geometries(node: Any) -> list[tuple[Geometry, tuple[int, ...], int]]:
    """Return geometry, kernel and channels that are summed; for "same", of both paddings.

    Where it is odd, one side has one element more than the other.
    """
    _, depth, *kernel = node.args[1].meta["val"].shape
    given = dict(enumerate(node.args))
    axes = range(len(kernel))
    stride, padding, dilation = (
        _for_each(given.get(position, default), axes)
        for position, default in ((3, 1), (4, 0), (5, 1))
    )
    paddings = [padding]
    if given.get(4) == "valid":
        paddings = [tuple(0 for _ in axes)]
    elif given.get(4) == "same":
        whole = [dilation[axis] * (kernel[axis] - 1) for axis in axes]
        paddings = [tuple(item // 2 for item in whole), tuple(-(-item // 2) for item in whole)]
    groups = given.get(6, 1)
    return [(Geometry(stride, sides, dilation, groups), tuple(kernel), depth) for sides in paddings]


def _for_each(value: Any, axes: range) -> tuple[Any, ...]:
    """Return an option of a convolution as one number for each axis."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(values[axis % len(values)] for axis in axes)
