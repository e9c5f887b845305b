"""Comparing states bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def differences(actual: Any, expected: Any, path: str = "state") -> list[str]:
    """Return where two values differ, one line per place; empty if they are equal bit for bit.

    Args:
        actual: nested mappings, lists and tuples of tensors, arrays and plain values.
        expected: what it is compared with. All NaN count as one; 0.0 and -0.0 do not, in tensors.
        path: name of the whole, with which each line begins.
    """
    if type(actual) is not type(expected):
        return [f"{path}: {type(actual).__name__} instead of {type(expected).__name__}"]
    if isinstance(expected, Tensor):
        return _tensor_differences(actual, expected, path)
    if isinstance(expected, Mapping):
        if actual.keys() != expected.keys():
            return [f"{path}: {_key_differences(actual, expected)}"]
        return [
            line
            for key, value in expected.items()
            for line in differences(actual[key], value, f"{path}.{key}")
        ]
    if isinstance(expected, (list, tuple)):
        if len(actual) != len(expected):
            return [f"{path}: {len(actual)} items instead of {len(expected)}"]
        return [
            line
            for index, (left, right) in enumerate(zip(actual, expected, strict=True))
            for line in differences(left, right, f"{path}[{index}]")
        ]
    if hasattr(expected, "__array__"):
        same = actual.shape == expected.shape and bool((actual == expected).all())
        return [] if same else [f"{path}: another {type(expected).__name__}"]
    # repr tells NaN from numbers and is equal for two of them.
    same = actual == expected or repr(actual) == repr(expected)
    return [] if same else [f"{path}: {actual!r} instead of {expected!r}"]


def assert_identical(actual: Any, expected: Any, path: str = "state") -> None:
    """Raise AssertionError, with the places, unless two values are equal bit for bit."""
    found = differences(actual, expected, path)
    if found:
        raise AssertionError("\n".join(found))


def _tensor_differences(actual: Tensor, expected: Tensor, path: str) -> list[str]:
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return [f"{path}: {_describe(actual)} instead of {_describe(expected)}"]
    differ = (_bytes(actual) != _bytes(expected)).any(1)
    if expected.is_floating_point() or expected.is_complex():
        nan = actual.detach().isnan().cpu() & expected.detach().isnan().cpu()
        differ &= ~nan.reshape(-1)
    count = int(differ.sum())
    return [f"{path}: {count} of {expected.numel()} elements differ"] if count else []


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(flat.numel(), flat.itemsize)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _key_differences(actual: Mapping[Any, Any], expected: Mapping[Any, Any]) -> str:
    more = sorted(map(str, actual.keys() - expected.keys()))
    fewer = sorted(map(str, expected.keys() - actual.keys()))
    parts = [f"{', '.join(more)} should not be there"] if more else []
    return "; ".join([*parts, *([f"{', '.join(fewer)} is missing"] if fewer else [])])
