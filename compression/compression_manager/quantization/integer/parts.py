"""Tensors in parts that stay in cache from one operation to the next.

Memory is slower than plain operations, so that each of them would wait for it anew. An accelerator
takes a tensor whole: there the start of an operation costs most.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# Elements of float32 for each thread, where nothing is known: half a mebibyte. Full bytes of bits.
_PART = 1 << 17
_FLOAT_BYTES = 4


def part_length(tensor: Tensor) -> int:
    """Return how many elements of `tensor` are taken at once."""
    count = max(tensor.numel(), 1)
    if tensor.device.type != "cpu":
        return count
    return min(_part_of_thread() * torch.get_num_threads(), count)


@cache
def _part_of_thread() -> int:
    """Return how many elements a core's second-level cache holds.

    More would be read from memory again by the next operation; with fewer, the starts of
    operations take as long as the operations.
    """
    ask = getattr(torch.cpu, "get_capabilities", None)  # not in torch 2.10
    size = 0 if ask is None else ask().get("l2_cache_size", 0) // _FLOAT_BYTES
    return max(_PART, 1 << size.bit_length() - 1) if size else _PART


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
