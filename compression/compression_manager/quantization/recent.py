"""What was computed of tensors that are still alive, so that layers share it.

Query, key and value of attention read one tensor, and so do the first convolution of a residual
block and its shortcut. An entry lives as long as its tensor, and counts as long as that is not
changed in place.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

_Value = TypeVar("_Value")

# A residual block has few tensors between two uses of its input.
_KEPT = 6


class _Key(NamedTuple):
    address: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    version: int


class _Entry:
    def __init__(self, tensor: Tensor, key: _Key) -> None:
        self.key = key
        self.values: dict[Any, Any] = {}
        # A dead tensor's address may be used again, and its codes are of no more use.
        self.tensor = TensorWeakRef(tensor)

    def is_alive(self) -> bool:
        return self.tensor() is not None


class _Entries(threading.local):
    def __init__(self) -> None:
        self.entries: deque[_Entry] = deque(maxlen=_KEPT)


_recent = _Entries()


def share(tensor: Tensor) -> None:
    """Let what is computed of `tensor` be found again, under all its aliases."""
    if tensor.is_inference():
        return
    key = _key(tensor)
    alive = [entry for entry in _recent.entries if entry.is_alive()]
    if len(alive) != len(_recent.entries):
        _recent.entries = deque(alive, maxlen=_KEPT)
    if not any(entry.key == key for entry in alive):
        _recent.entries.append(_Entry(tensor, key))


def shared(tensor: Tensor, what: object, compute: Callable[[], _Value]) -> _Value:
    """Return `compute()`, or what it returned for `what` of the same shared tensor."""
    if not _recent.entries or tensor.is_inference():
        return compute()
    key = _key(tensor)
    for entry in _recent.entries:
        if entry.key == key and entry.is_alive():
            if what not in entry.values:
                entry.values[what] = compute()
            value: _Value = entry.values[what]
            return value
    return compute()


def version_of(tensor: Tensor) -> int:
    """Return autograd's count of changes; 0 for inference tensors, which it does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _key(tensor: Tensor) -> _Key:
    return _Key(
        tensor.untyped_storage().data_ptr(),
        int(tensor.storage_offset()),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor._version,
    )
