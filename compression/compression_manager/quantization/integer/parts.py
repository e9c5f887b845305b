"""Tensors in parts that stay in cache from one operation to the next.

Memory is slower than plain operations, so that each of them would wait for it anew. An accelerator
takes a tensor whole: there the start of an operation costs most.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Elements: a mebibyte of float32, which the second-level caches of two cores hold. Full bytes of
# bits.
_PART = 1 << 18


def part_length(tensor: Tensor) -> int:
    """Return how many elements of `tensor` are taken at once."""
    count = max(tensor.numel(), 1)
    return min(_PART, count) if tensor.device.type == "cpu" else count


def parts(flat: Tensor) -> Iterator[slice]:
    """Yield the parts of a vector; one that is empty for an empty vector."""
    count, length = flat.numel(), part_length(flat)
    for start in range(0, max(count, 1), length):
        yield slice(start, min(start + length, count))


def row_parts(matrix: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield as many rows of each matrix as make a part of the first."""
    count = max(part_length(matrix) // max(matrix.shape[1], 1), 1)
    if count >= matrix.shape[0]:  # Splitting takes longer than a pass over a small matrix.
        return iter([(matrix, *others)])
    return zip(matrix.split(count), *(other.split(count) for other in others), strict=True)
