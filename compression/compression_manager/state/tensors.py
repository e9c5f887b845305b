"""Tensors in a state tree: which can be stored, and their memory layout."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import safetensors.torch
import torch
from torch import Tensor, nn


def why_not_storable(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be stored, or None."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"tensors of the class {type(tensor).__name__} are not stored"
    if tensor.layout is not torch.strided:
        return f"tensors with the layout {tensor.layout} are not stored"
    if tensor.is_meta:
        return "a tensor on the meta device has no values"
    if not _is_storable_dtype(tensor.dtype):
        return f"safetensors cannot hold {tensor.dtype}"
    return None


@functools.cache
def _is_storable_dtype(dtype: torch.dtype) -> bool:
    if dtype in {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4}:
        return False
    try:
        safetensors.torch.save({"probe": torch.empty(0, dtype=dtype)})
    except (KeyError, RuntimeError, TypeError, safetensors.SafetensorError):
        return False
    return True


def special_strides(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the strides of a dense tensor unless they are the usual row-major ones.

    Strides of dimensions of size 1 count too: they decide whether torch takes a tensor for
    channels_last, hence the order of later sums.
    """
    strides = tensor.stride()
    if tensor.numel() == 0 or strides == _row_major(tensor.shape):
        return None
    return strides


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether `strides` visit each of the elements of `shape` once, without gaps."""
    if len(shape) != len(strides) or any(stride < 0 for stride in strides):
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a copy of `tensor` with the same values and the given dense strides.

    Raises:
        ValueError: the strides do not fit the shape.
    """
    if not is_dense(tensor.shape, strides):
        raise ValueError(f"strides {list(strides)} do not fit the shape {list(tensor.shape)}")
    result = torch.empty_strided(tensor.shape, tuple(strides), dtype=tensor.dtype)
    return result.copy_(tensor)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)


class TensorStore:
    """Collects tensors under readable names; the same view of the same memory only once.

    Attributes:
        tensors: name -> contiguous CPU tensor, no two sharing memory, as safetensors demands.
            They may be views of the originals: write them before training goes on.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        # The originals are kept alive so that no address is used twice.
        self._stored: dict[object, tuple[str, tuple[int, ...] | None, Tensor]] = {}
        self._memory: set[int] = set()

    def add(self, tensor: Tensor, name: str) -> tuple[str, tuple[int, ...] | None]:
        """Store a tensor and return its name and its strides (None: row-major).

        Args:
            tensor: any storable tensor; a view with gaps or overlaps is stored compactly.
            name: wanted name; another is found if it is taken.
        """
        tensor = tensor.detach()
        view = _view_key(tensor)
        if view is not None and view in self._stored:
            return self._stored[view][:2]
        free_name = self._free_name(name)
        plain = tensor.resolve_conj().resolve_neg().cpu()
        if not is_dense(plain.shape, plain.stride()):
            plain = plain.clone()
        strides = special_strides(plain)
        contiguous = plain.contiguous()
        if contiguous.untyped_storage().data_ptr() in self._memory:
            contiguous = contiguous.clone()
        self._memory.add(contiguous.untyped_storage().data_ptr())
        self.tensors[free_name] = contiguous
        if view is not None:
            self._stored[view] = (free_name, strides, tensor)
        return free_name, strides

    def _free_name(self, name: str) -> str:
        # safetensors takes valid Unicode only and keeps one name for itself.
        base = name.encode("utf-8", "backslashreplace").decode() or "tensor"
        candidate, number = base, 1
        while candidate in self.tensors or candidate == "__metadata__":
            number += 1
            candidate = f"{base}#{number}"
        return candidate


def _view_key(tensor: Tensor) -> object:
    if tensor.numel() == 0:
        return None
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.device,
        tensor.storage_offset(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )
