"""NumPy arrays and scalars in a state tree, as raw bytes with their exact types.

NumPy is imported only where a value shows that it is in use already, or was when saving.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

# Kinds of dtype whose values are plain bytes: no objects, no records.
_PLAIN_KINDS = frozenset("biufcSUmM")


def is_array(value: Any) -> TypeGuard[np.ndarray[Any, Any]]:
    """Return whether `value` is a plain array (not a subclass) of plain numbers or text."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and value.dtype.kind in _PLAIN_KINDS


def is_scalar(value: Any) -> TypeGuard[np.generic]:
    """Return whether `value` is a NumPy number or text."""
    numpy = sys.modules.get("numpy")
    return (
        numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in _PLAIN_KINDS
    )


def array_bytes(array: np.ndarray[Any, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the array's bytes, a uint8 tensor, and what `array_from` needs besides."""
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    content = bytearray(array.tobytes("F" if order == "F" else "C"))
    data = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
    return data, {"dtype": array.dtype.str, "shape": list(array.shape), "order": order}


def array_from(data: Tensor, dtype: str, shape: list[int], order: str) -> np.ndarray[Any, Any]:
    """Return the array again, owning its memory.

    Raises:
        ValueError, TypeError: the description does not fit the bytes.
    """
    import numpy as np

    content = bytes(data.numpy())
    kind = _plain_dtype(dtype)
    view: np.ndarray[Any, Any] = np.ndarray(
        tuple(shape), kind, content, order="F" if order == "F" else "C"
    )
    if view.nbytes != len(content):
        raise ValueError(f"{len(content)} bytes are no array of shape {shape} and type {dtype}")
    return view.copy(order="K")


def scalar_from(dtype: str, content: str) -> Any:
    """Return the NumPy scalar whose bytes are given in hexadecimal.

    Raises:
        ValueError, TypeError: the description does not fit the bytes.
    """
    data = torch.tensor(list(bytes.fromhex(content)), dtype=torch.uint8)
    return array_from(data, dtype, [], "C")[()]


def _plain_dtype(name: str) -> np.dtype[Any]:
    import numpy as np

    dtype: np.dtype[Any] = np.dtype(name)
    if dtype.kind not in _PLAIN_KINDS:
        raise TypeError(f"{name} is no plain number or text")
    return dtype
