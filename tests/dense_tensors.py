"""Dense tensors in any order of their axes, with the values that arithmetic gets wrong."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

LARGEST = np.finfo(np.float32).max
SPECIAL = np.array(
    [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, np.nan, np.inf, -np.inf, LARGEST, -LARGEST, 1e-40],
    dtype=np.float32,
)


@st.composite
def layouts(draw: st.DrawFn, minimum_axes: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and the order of the axes in memory."""
    sizes = tuple(draw(st.lists(st.integers(0, 9), min_size=minimum_axes, max_size=4)))
    if draw(st.booleans()):  # longer than the groups that kernels work in
        sizes = (*sizes, draw(st.integers(60, 140)))
    order = tuple(draw(st.permutations(range(len(sizes)))))
    return sizes, order


def arranged(values: np.ndarray, sizes: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """A tensor of shape `sizes` whose memory holds `values`, axes in `order` there."""
    in_memory = torch.from_numpy(values.copy()).reshape([sizes[axis] for axis in order])
    return in_memory.permute([order.index(axis) for axis in range(len(sizes))])


@st.composite
def float_tensors(draw: st.DrawFn, minimum_axes: int = 0) -> Tensor:
    """Ordinary numbers, ties between integers, and a few special values."""
    sizes, order = draw(layouts(minimum_axes))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = int(np.prod(sizes))
    width = draw(st.sampled_from([0.01, 1.0, 40.0, 1e4]))
    values = generator.normal(size=count).astype(np.float32) * np.float32(width)
    if draw(st.booleans()):
        values = np.floor(values) + np.float32(0.5)
    chosen = generator.random(count) < draw(st.sampled_from([0.0, 0.02, 0.5]))
    values[chosen] = generator.choice(SPECIAL, size=int(chosen.sum()))
    return arranged(values, sizes, order)


@st.composite
def code_tensors(draw: st.DrawFn, *dtypes: type, minimum_axes: int = 0) -> Tensor:
    """Any integers of one of the types."""
    sizes, order = draw(layouts(minimum_axes))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    limits = np.iinfo(draw(st.sampled_from(dtypes)))
    count = int(np.prod(sizes))
    values = generator.integers(limits.min, limits.max, size=count, endpoint=True)
    return arranged(values.astype(limits.dtype), sizes, order)


def values_like(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for the values of codes."""
    return torch.empty_like(codes, dtype=dtype)


def memory(tensor: Tensor) -> np.ndarray:
    """The elements in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).numpy()


def bits(mask: Tensor | None, count: int) -> np.ndarray:
    """A packed mask as booleans; none where there is no mask."""
    if mask is None:
        return np.zeros(count, dtype=bool)
    assert mask.dtype == torch.uint8
    assert mask.shape == ((count + 7) // 8,)
    return np.unpackbits(mask.numpy(), count=count, bitorder="little").astype(bool)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether all bits are equal; any NaN equals any other."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    unordered = np.isnan(left) & np.isnan(right)
    return bool(np.all(unordered | (left.view(np.int32) == right.view(np.int32))))


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite float32 numbers with eight digits, half to even."""
    number = values.view(np.uint32).astype(np.uint64)
    number = (number + 0x7FFF + (number >> 16 & 1)) & 0xFFFF0000
    return number.astype(np.uint32).view(np.float32)
