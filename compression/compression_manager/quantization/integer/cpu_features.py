"""What this machine's CPU can multiply fast, as far as the rule for integer products asks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch


class CpuFeatures(NamedTuple):
    """The instructions that decide which arithmetic a layer computes with.

    Attributes:
        vnni: 8-bit products with 32-bit sums (AVX-512 VNNI). Without them oneDNN's 8-bit kernels
            saturate.
        amx: tiles of 8-bit and bfloat16 numbers.
        bfloat16: products of bfloat16 numbers (AVX-512 BF16), two at a time where float32 has one.
            With neither these nor AMX they are slower than those of float32.
    """

    vnni: bool
    amx: bool
    bfloat16: bool = False

    def __str__(self) -> str:
        found = [name for name, there in (("VNNI", self.vnni), ("AMX", self.amx)) if there]
        return " and ".join(found) or "neither VNNI nor AMX"


@cache
def cpu_features() -> CpuFeatures:
    """Return the features of the CPU that this process runs on."""
    return CpuFeatures(
        vnni=_asks("_is_vnni_supported"),
        # torch asks the operating system for the tiles' registers before it says yes.
        amx=_asks("_is_amx_tile_supported") and _asks("_init_amx"),
        bfloat16=_asks("_is_avx512_bf16_supported"),
    )


def _asks(name: str) -> bool:
    question: Callable[[], bool] | None = getattr(torch.cpu, name, None)
    return question is not None and bool(question())
