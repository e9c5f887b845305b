"""What a benchmark ran on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression_manager.run_report.environment import describe_environment

FEATURES = {
    "AVX2": ("avx2",),
    "AVX512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AVX512-BF16": ("avx512_bf16",),
    "AMX-int8": ("amx_int8",),
    "AMX-bf16": ("amx_bf16",),
}
"""Name -> flags of /proc/cpuinfo; one of them is enough."""


def describe_machine() -> dict[str, Any]:
    """Return versions, processor, threads and what the processor has for small integers."""
    described = describe_environment(nn.Module())
    kept = ("torch", "python", "platform", "processor", "cpu_count", "threads")
    return {name: described[name] for name in kept} | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": features(),
    }


def features(cpu_info: Path = Path("/proc/cpuinfo")) -> dict[str, bool]:
    """Return which of `FEATURES` the processor has."""
    try:
        lines = cpu_info.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return {name: any(flag in flags for flag in any_of) for name, any_of in FEATURES.items()}


def in_words(machine: dict[str, Any]) -> str:
    """Return one line that describes what `describe_machine` returned."""
    having = [name for name, present in machine["features"].items() if present]
    lacking = [name for name, present in machine["features"].items() if not present]
    text = (
        f"{machine['processor']}, {machine['cpu_count']} cores, {machine['threads']} threads used; "
        f"has {', '.join(having) or 'none of the features asked for'}"
    )
    if lacking:
        text += f", lacks {', '.join(lacking)}"
    return f"{text}; torch {machine['torch']}, Python {machine['python']}"
