"""A few values of a tensor, which tell it from others."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def sample(tensor: Tensor, count: int) -> list[Any]:
    """Return `count` values from all over a tensor on the CPU, as numbers; none of an empty one.

    At random places, because rows and columns may be dead, and borders and padding are the same
    everywhere; always at the same ones for as many elements.
    """
    return tensor.take(_places(tensor.numel(), count)).tolist() if tensor.numel() else []


@lru_cache(maxsize=256)
def _places(length: int, count: int) -> Tensor:
    # Whatever device or mode is the default where a size is met first.
    with torch.device("cpu"), torch.inference_mode(False):
        return torch.randint(length, (count,), generator=torch.Generator().manual_seed(0))
