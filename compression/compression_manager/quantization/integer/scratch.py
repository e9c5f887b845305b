"""Memory for real numbers that nobody keeps beyond one product.

A tensor of some mebibytes that was freed goes back to the system, which clears the next one page by
page; that takes longer than turning integers into real numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

# Bytes: what is larger is not held.
_LARGEST = 1 << 25
# Bytes to which sizes are rounded, so that a buffer serves elements of any size.
_UNIT = 64
# More shapes than a network has; inputs of ever new lengths have more.
_MANY = 256

_Key = tuple[str, torch.dtype, torch.Size, tuple[int, ...]]


class _Buffers(threading.local):
    """Those of one thread.

    Attributes:
        kept: use -> memory.
        shaped: the tensors in it, which take longer to make than small ones to fill.
        held: use -> the integers whose real numbers are in that memory, and these.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.shaped: dict[_Key, Tensor] = {}
        self.held: dict[str, tuple[TensorWeakRef, Tensor]] = {}


_buffers = _Buffers()


def values_of(
    codes: Tensor, dtype: torch.dtype, use: str, write: Callable[[Tensor], object]
) -> Tensor:
    """Return the real numbers of `codes`, until this thread asks for others for the same use.

    Args:
        codes: dense integers, which nobody changes.
        dtype: of the numbers.
        use: results for different uses never share memory.
        write: writes the numbers to a tensor of that type, with the shape and strides of `codes`;
            not called where they still are from before.
    """
    held = _buffers.held.get(use)
    if held is not None and held[1].dtype == dtype and held[0]() is codes:
        return held[1]
    memory = claim(codes, dtype, use)
    values = torch.empty_like(codes, dtype=dtype) if memory is None else memory
    write(values)
    if memory is not None:
        hold(use, codes, memory)
    return values


def claim(tensor: Tensor, dtype: torch.dtype, use: str) -> Tensor | None:
    """Return memory for numbers with the shape and strides of `tensor`; None if none is kept.

    The caller says by `hold` what it wrote.
    """
    if not tensor.is_cpu:
        return None
    _buffers.held.pop(use, None)
    key = use, dtype, tensor.shape, tensor.stride()
    found = _buffers.shaped.get(key)
    if found is not None:
        return found
    size = tensor.numel() * dtype.itemsize
    if size > _LARGEST:
        return None
    if len(_buffers.shaped) >= _MANY:
        _buffers.shaped.clear()
    with torch.inference_mode(False):  # whose tensors cannot be written to outside of it
        made = _memory(use, size).view(dtype).as_strided(tensor.shape, tensor.stride())
    _buffers.shaped[key] = made
    return made


def hold(use: str, codes: Tensor, values: Tensor) -> None:
    """Say that `values`, which was claimed last for `use`, has the real numbers of `codes` now."""
    _buffers.held[use] = TensorWeakRef(codes), values


def _memory(use: str, size: int) -> Tensor:
    """Return the memory for a use: at least `size` bytes."""
    kept = _buffers.kept.get(use)
    if kept is None or kept.nbytes < size:
        kept = torch.empty(-(-size // _UNIT) * _UNIT, dtype=torch.uint8, device="cpu")
        _buffers.kept[use] = kept
        for key in [key for key in _buffers.shaped if key[0] == use]:
            del _buffers.shaped[key]
    return kept
