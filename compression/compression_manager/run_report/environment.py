"""What a training runs on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from compression_manager.ranks import is_distributed

_CPU_INFO = Path("/proc/cpuinfo")


def describe_environment(model: nn.Module) -> dict[str, Any]:
    """Return versions and hardware as JSON values; what is unknown is None.

    Args:
        model: where its tensors lie are the devices that count.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "compression_manager": _own_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": sorted({_device_name(tensor.device) for tensor in tensors}),
        "processes": dist.get_world_size() if is_distributed() else 1,
    }


def _own_version() -> str | None:
    try:
        return version("compression-manager")
    except PackageNotFoundError:
        return None


def _processor() -> str | None:
    """Return the processor's name, which Python's platform module does not know on Linux."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return str(device)
