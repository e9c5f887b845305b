"""Any nesting of plain values as one JSON document and named tensors, and back.

JSON holds None, bool, str, list, dicts with string keys, and finite numbers as they are.
Everything else is an object with a single key that starts with "$" and names the type.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compression_manager.errors import CheckpointCorruptError, CheckpointError
from compression_manager.state import arrays
from compression_manager.state.tensors import TensorStore, why_not_storable, with_strides

_TAG = "$"
# Every state that is written must be readable, whatever the depth of the caller's stack.
_MAX_DEPTH = 64
# Larger integers would be rounded by JSON readers that know only doubles.
_LARGEST_JSON_INT = 2**53

Path = tuple[str, ...]


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take a state apart into JSON values and tensors.

    Args:
        state: any nesting of dict, OrderedDict and Counter (keys: None, bool, int, float, str,
            bytes, NumPy scalars), list, tuple, None, bool, int, float, str, bytes, tensors,
            NumPy arrays and scalars.

    Returns:
        The JSON document, and name -> tensor (CPU, contiguous, no two sharing memory). The
        tensors may be views of the state's: write them before training goes on.

    Raises:
        CheckpointError: a value has another type; the message gives its key path.
    """
    flattener = _Flattener()
    return flattener.encode(state, ()), flattener.store.tensors


def unflatten(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a state together again; the inverse of `flatten`.

    Types, values, dict order and memory formats come back exactly. Tensors come back on the
    CPU, detached; what was one view of one memory is one tensor again.

    Raises:
        CheckpointCorruptError: the document does not describe a state.
    """
    try:
        return _Unflattener(tensors).decode(document, 0)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointCorruptError(f"the document does not describe a state: {error}") from error


class _Flattener:
    def __init__(self) -> None:
        self.store = TensorStore()
        self._by_type: dict[type, Callable[[Any, Path], Any]] = {
            type(None): _unchanged,
            bool: _unchanged,
            str: _unchanged,
            int: _encode_int,
            float: _encode_float,
            bytes: _encode_bytes,
            list: self._items,
            tuple: self._tuple,
            dict: self._dict,
            OrderedDict: self._ordered_dict,
            Counter: self._counter,
        }

    def encode(self, value: Any, path: Path) -> Any:
        if len(path) > _MAX_DEPTH:
            raise CheckpointError(
                f"the state is nested deeper than {_MAX_DEPTH} levels, or contains itself, at "
                f"{'/'.join(path[:8])}/..."
            )
        encode = self._by_type.get(type(value))
        if encode is not None:
            return encode(value, path)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if arrays.is_array(value):
            data, description = arrays.array_bytes(value)
            name, _ = self.store.add(data, "/".join(path))
            return {"$array": {"name": name, **description}}
        if arrays.is_scalar(value):
            return {"$scalar": {"dtype": value.dtype.str, "bytes": value.tobytes().hex()}}
        raise CheckpointError(
            f"the state holds a {type(value).__module__}.{type(value).__qualname__} at "
            f"{_shown(path)}. Valid: dict, list, tuple, None, bool, int, float, str, bytes, "
            "tensors, NumPy arrays and scalars."
        )

    def _items(self, values: list[Any] | tuple[Any, ...], path: Path) -> list[Any]:
        return [self.encode(value, (*path, str(index))) for index, value in enumerate(values)]

    def _tuple(self, values: tuple[Any, ...], path: Path) -> Any:
        return {"$tuple": self._items(values, path)}

    def _dict(self, values: Mapping[Any, Any], path: Path) -> Any:
        encoded = [(key, self.encode(value, (*path, str(key)))) for key, value in values.items()]
        if all(type(key) is str and not key.startswith(_TAG) for key in values):
            return dict(encoded)
        return {"$dict": [[self._key(key, path), value] for key, value in encoded]}

    def _key(self, key: Any, path: Path) -> Any:
        if type(key) in {type(None), bool, int, float, str, bytes} or arrays.is_scalar(key):
            return self.encode(key, path)
        raise CheckpointError(
            f"the dict at {_shown(path)} has a key of the type {type(key).__name__}: {key!r}. "
            "Valid: None, bool, int, float, str, bytes, NumPy scalars."
        )

    def _ordered_dict(self, values: OrderedDict[Any, Any], path: Path) -> Any:
        # nn.Module.state_dict() keeps the versions of its modules in this attribute.
        metadata = getattr(values, "_metadata", None)
        return {"$ordered_dict": [self._dict(values, path), self.encode(metadata, path)]}

    def _counter(self, values: Counter[Any], path: Path) -> Any:
        return {"$counter": self._dict(values, path)}

    def _tensor(self, tensor: Tensor, path: Path) -> Any:
        reason = why_not_storable(tensor)
        if reason is not None:
            raise CheckpointError(f"the tensor at {_shown(path)} cannot be saved: {reason}.")
        name, strides = self.store.add(tensor, "/".join(path))
        if strides is None:
            return {"$tensor": name}
        return {"$strided_tensor": {"name": name, "strides": list(strides)}}


def _unchanged(value: Any, path: Path) -> Any:
    return value


def _encode_int(value: int, path: Path) -> Any:
    # Python limits the length of decimal integers that it parses, but not of hexadecimal ones.
    return value if abs(value) <= _LARGEST_JSON_INT else {"$int": hex(value)}


def _encode_float(value: float, path: Path) -> Any:
    return value if math.isfinite(value) else {"$float": repr(value)}


def _encode_bytes(value: bytes, path: Path) -> Any:
    return {"$bytes": base64.b64encode(value).decode("ascii")}


def _shown(path: Path) -> str:
    return "/".join(path) or "its root"


class _Unflattener:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._strided: dict[str, Tensor] = {}
        self._by_tag: dict[str, Callable[[Any, int], Any]] = {
            "$tuple": lambda content, depth: tuple(self._items(content, depth)),
            "$dict": self._dict,
            "$ordered_dict": self._ordered_dict,
            "$counter": self._counter,
            "$int": lambda content, depth: int(content, 16),
            "$float": lambda content, depth: float(content),
            "$bytes": lambda content, depth: base64.b64decode(content, validate=True),
            "$tensor": lambda content, depth: self._tensors[content],
            "$strided_tensor": self._strided_tensor,
            "$array": self._array,
            "$scalar": lambda content, depth: arrays.scalar_from(
                content["dtype"], content["bytes"]
            ),
        }

    def decode(self, value: Any, depth: int) -> Any:
        # A level of the state takes up to four levels of the document.
        if depth > 4 * _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(value, list):
            return self._items(value, depth)
        if not isinstance(value, dict):
            return value
        tags = [key for key in value if key.startswith(_TAG)]
        if not tags:
            return {key: self.decode(item, depth + 1) for key, item in value.items()}
        if len(value) != 1 or tags[0] not in self._by_tag:
            raise ValueError(f"unknown type {tags[0]!r}")
        return self._by_tag[tags[0]](value[tags[0]], depth + 1)

    def _items(self, values: Any, depth: int) -> list[Any]:
        if not isinstance(values, list):
            raise TypeError(f"expected a list, found {type(values).__name__}")
        return [self.decode(value, depth + 1) for value in values]

    def _dict(self, pairs: Any, depth: int) -> dict[Any, Any]:
        return {self.decode(key, depth + 1): self.decode(value, depth + 1) for key, value in pairs}

    def _ordered_dict(self, content: Any, depth: int) -> OrderedDict[Any, Any]:
        items, metadata = (self.decode(part, depth + 1) for part in content)
        result: OrderedDict[Any, Any] = OrderedDict(items)
        if metadata is not None:
            setattr(result, "_metadata", metadata)
        return result

    def _counter(self, content: Any, depth: int) -> Counter[Any]:
        result: Counter[Any] = Counter()
        dict.update(result, self.decode(content, depth + 1))
        return result

    def _strided_tensor(self, content: Any, depth: int) -> Tensor:
        name = content["name"]
        if name not in self._strided:
            self._strided[name] = with_strides(self._tensors[name], content["strides"])
        return self._strided[name]

    def _array(self, content: Any, depth: int) -> Any:
        data = self._tensors[content["name"]]
        if data.dtype is not torch.uint8 or data.dim() != 1:
            raise TypeError("the bytes of an array must be a flat uint8 tensor")
        return arrays.array_from(data, content["dtype"], content["shape"], content["order"])
