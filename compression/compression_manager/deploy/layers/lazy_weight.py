"""What a deployed layer answers for its weight: floating point, dequantized when values are read.

Models ask a weight for its dtype or device in every forward pass, which must not cost as much as
the layer itself. A deployed layer computes with its integers, so that values are read by the
model's own code alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LazyWeight(Tensor):
    """Describes itself without values; whatever else is asked of it is asked of the real weight."""

    _layer: _HasWeight

    @staticmethod
    def __new__(
        cls,
        layer: _HasWeight,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> LazyWeight:
        """Return what stands for `layer.dequantized()`, of this shape, dtype and device."""
        weight: LazyWeight = _TENSOR._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._layer = layer
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what is known; else call `func` with the dequantized weight."""
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has a static method
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with the dequantized weight."""
        args, kwargs = tree_map_only(cls, _values, (args, kwargs or {}))
        return func(*args, **kwargs)


@contextmanager
def noting_reads() -> Iterator[set[int]]:
    """Return a set that receives the id of each layer whose weight is read within the context."""
    noted: set[int] = set()
    token = _reads.set(noted)
    try:
        yield noted
    finally:
        _reads.reset(token)


def _values(weight: LazyWeight) -> Tensor:
    noted = _reads.get()
    if noted is not None:
        noted.add(id(weight._layer))
    return weight._layer.dequantized()


class _HasWeight(Protocol):
    def dequantized(self) -> Tensor: ...


_reads: ContextVar[set[int] | None] = ContextVar("reads of deployed weights", default=None)


# Any, because torch's stubs lack some of what is used here.
_TENSOR: Any = Tensor
_KNOWN = frozenset(
    {
        _TENSOR.dtype.__get__,
        _TENSOR.device.__get__,
        _TENSOR.shape.__get__,
        _TENSOR.is_floating_point,
        _TENSOR.size,
        _TENSOR.dim,
    }
)
