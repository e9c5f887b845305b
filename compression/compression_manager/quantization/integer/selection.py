"""Which passes compute, and whether layers compute on integers at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compression_manager.quantization.autograd import transforms_run
from compression_manager.quantization.integer.cpu_features import cpu_features
from compression_manager.quantization.integer.native.loader import load_library
from compression_manager.quantization.integer.native.passes import NativePasses
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.torch_passes import TorchPasses

TORCH = TorchPasses()

_chosen: Passes | None = None
_native: Passes | None = None
_recording = threading.local()


def active_passes() -> Passes:
    """Return what computes the passes on the CPU: native kernels, once they were made ready."""
    return _chosen or _native or TORCH


def prepare_native(*, builds: bool = True) -> str | None:
    """Make the native kernels ready, which builds them where that was never done.

    Args:
        builds: as for `load_library`.

    Returns:
        Why there are none; None if they are ready.

    Raises:
        ConfigError: the environment variable COMPRESSION_MANAGER_NATIVE is neither 0 nor 1.
    """
    global _native
    library = load_library(builds=builds)
    _native = NativePasses() if library.functions is not None else None
    return library.reason or None


@contextmanager
def use_passes(passes: Passes) -> Iterator[None]:
    """Compute with `passes`, in the whole process, as long as the context lasts."""
    global _chosen
    before, _chosen = _chosen, passes
    try:
        yield
    finally:
        _chosen = before


def arithmetic_in_use(options: ProductOptions) -> dict[str, str | int]:
    """Return what decides how products round: options, CPU, and who multiplies if that matters."""
    if options.forward == "fake":
        return {"forward": "fake"}
    features = cpu_features()
    used: dict[str, str | int] = {
        "forward": options.forward,
        "backward": options.backward,
        # Digits, so that a checkpoint has the same size on every machine.
        "vnni": int(features.vnni),
        "amx": int(features.amx),
        "native integers": int(active_passes().supports_integers()),
    }
    if options.backward != "float32":
        used["bfloat16"] = int(features.bfloat16)
        used["passes"] = active_passes().name
    return used


def passes_for(device: torch.device) -> Passes:
    """Return what computes passes on `device`: native ones take the CPU's memory only."""
    return active_passes() if device.type == "cpu" else TORCH


def why_reference() -> str | None:
    """Return why layers are to call the functions of `arithmetic` now; None if they need not."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "it is compiled or traced, which sees through fake quantization only"
    if transforms_run():
        return "torch.func or forward mode runs, which see through fake quantization only"
    return "the operations are being recorded" if _is_recording() else None


@contextmanager
def reference_arithmetic() -> Iterator[None]:
    """Let every layer call the functions of `arithmetic`, so that a recording sees them.

    In this thread; another may train meanwhile.
    """
    before, _recording.active = _is_recording(), True
    try:
        yield
    finally:
        _recording.active = before


def _is_recording() -> bool:
    return getattr(_recording, "active", False)
