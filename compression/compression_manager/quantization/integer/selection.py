"""Which passes compute, and whether layers compute on integers at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.torch_passes import TorchPasses

TORCH = TorchPasses()

_chosen: Passes | None = None
_reference = False


def active_passes() -> Passes:
    """Return what computes the passes on the CPU."""
    return TORCH if _chosen is None else _chosen


@contextmanager
def use_passes(passes: Passes) -> Iterator[None]:
    """Compute with `passes`, in the whole process, as long as the context lasts."""
    global _chosen
    before, _chosen = _chosen, passes
    try:
        yield
    finally:
        _chosen = before


def computes_reference() -> bool:
    """Return whether layers are to call the functions of `arithmetic` now."""
    return _reference


@contextmanager
def reference_arithmetic() -> Iterator[None]:
    """Let every layer call the functions of `arithmetic`, so that a recording sees them."""
    global _reference
    before, _reference = _reference, True
    try:
        yield
    finally:
        _reference = before
