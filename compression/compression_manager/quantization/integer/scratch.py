"""Memory for real numbers that nobody keeps beyond one product.

A tensor of some mebibytes that was freed goes back to the system, which clears the next one page by
page; that takes longer than turning integers into real numbers.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Bytes: what is larger is not held.
_LARGEST = 1 << 25
# Bytes to which sizes are rounded, so that a buffer serves elements of any size.
_UNIT = 64


class _Buffers(threading.local):
    """Those of one thread."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}


_buffers = _Buffers()


def scratch_like(tensor: Tensor, dtype: torch.dtype, use: str) -> Tensor:
    """Return a tensor to write to, which the thread's next call for the same use may return again.

    Args:
        tensor: dense; its shape and strides are those of the result.
        dtype: of the result.
        use: results for different uses never share memory.
    """
    size = tensor.numel() * dtype.itemsize
    if tensor.device.type != "cpu" or size > _LARGEST:
        return torch.empty_like(tensor, dtype=dtype)
    kept = _buffers.kept.get(use)
    if kept is None or kept.nbytes < size:
        with torch.inference_mode(False):  # whose tensors cannot be written to outside of it
            kept = torch.empty(-(-size // _UNIT) * _UNIT, dtype=torch.uint8, device="cpu")
        _buffers.kept[use] = kept
    return kept.view(dtype).as_strided(tensor.shape, tensor.stride())
