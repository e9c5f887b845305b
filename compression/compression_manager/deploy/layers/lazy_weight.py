"""What a deployed layer answers for its weight: floating point, dequantized when values are read.

Models ask a weight for its dtype or device in every forward pass, which must not cost as much as
the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LazyWeight(Tensor):
    """Describes itself without values; whatever else is asked of it is asked of the real weight."""

    _decode: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        decode: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> LazyWeight:
        """Return what stands for `decode()`, which is of this shape, dtype and device."""
        weight: LazyWeight = _TENSOR._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._decode = decode
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
        args, kwargs = tree_map_only(cls, lambda weight: weight._decode(), (args, kwargs or {}))
        return func(*args, **kwargs)


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
