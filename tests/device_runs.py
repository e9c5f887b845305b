"""Comparing what two devices compute, bit for bit, and watching for waits; for tests of CUDA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(actual: Tensor, expected: Tensor, what: object = "") -> None:
    """Compare dtype, shape, strides and bits of a tensor on any device with one on the CPU."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    assert actual.stride() == expected.stride(), what
    actual, expected = actual.detach().cpu(), expected.detach()
    if actual.is_floating_point():
        # Which of the many NaNs it is means nothing.
        assert torch.equal(actual.isnan(), expected.isnan()), what
        kind = _INTEGERS[actual.itemsize]
        actual, expected = (
            torch.where(item.isnan(), 0.0, item).contiguous().view(kind)
            for item in (actual, expected)
        )
    differing = int((actual != expected).sum())
    assert differing == 0, f"{what}: {differing} of {actual.numel()} differ"


def assert_same_state(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: object = ""
) -> None:
    """Compare two state_dicts bit for bit."""
    assert actual.keys() == expected.keys(), what
    for name, value in expected.items():
        assert_same_bits(actual[name], value, f"{what} {name}")


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Let CUDA raise where the host would wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(items: Any, device: torch.device) -> Any:
    """Return a tensor, or a tuple of them, on `device`."""
    if isinstance(items, tuple):
        return tuple(item.to(device) for item in items)
    return items.to(device)
