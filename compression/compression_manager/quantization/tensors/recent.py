"""What was computed of tensors that are still alive, so that layers share it.

Query, key and value of attention read one tensor, and so do the first convolution of a residual
block, its shortcut and its sum. An entry lives as long as its tensor, and counts as long as that
is not changed in place.

Only of results that autograd follows. What comes from outside of the model may be a buffer that is
filled anew for each call, by numpy, by another process or through `.data`, which leaves no trace.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from compression_manager.quantization.tensors.changes import sample_of

# A residual block has few tensors between two uses of its input.
_KEPT = 6

_Key = tuple[int, torch.Size, tuple[int, ...], torch.dtype, int]


class _Entry:
    def __init__(self, tensor: Tensor, key: _Key) -> None:
        self.key = key
        self.sample = sample_of(tensor.detach())
        self.values: dict[object, Any] = {}
        # A dead tensor's address may be used again, and its codes are of no more use.
        self.tensor = TensorWeakRef(tensor)

    def is_alive(self) -> bool:
        """Return whether the tensor still exists."""
        return self.tensor() is not None

    def is_current(self) -> bool:
        """Return whether the tensor lives as it was; what is done to `.data` leaves no trace."""
        tensor = self.tensor()
        return (
            tensor is not None
            and _key_of(tensor) == self.key
            and sample_of(tensor.detach()) == self.sample
        )


class _Entries(threading.local):
    def __init__(self) -> None:
        self.entries: deque[_Entry] = deque(maxlen=_KEPT)


_recent = _Entries()


def remembered(tensor: Tensor) -> dict[object, Any]:
    """Return what was computed of `tensor`, or of an alias of it, for the caller to add to.

    An empty dict of the caller's own if nobody may share it.
    """
    # What is computed in inference mode cannot be kept for a backward pass.
    if tensor.grad_fn is None or torch.is_inference_mode_enabled():
        return {}
    key = _key_of(tensor)
    for entry in _recent.entries:
        if entry.key == key and entry.is_current():
            return entry.values
    added = _Entry(tensor, key)
    alive = [entry for entry in _recent.entries if entry.is_alive()]
    _recent.entries = deque([*alive, added], maxlen=_KEPT)
    return added.values


def _key_of(tensor: Tensor) -> _Key:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
