"""Telling one batch from another by a few of its numbers."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from compression_manager.model_call import tensors_in

_SAMPLED = 8


def identity_of(batch: Any) -> str:
    """Return what other batches hardly share: of shapes, types and a few values of its tensors.

    Args:
        batch: tensors in a nesting of mappings, lists, tuples and dataclasses; all else is ignored,
            and so are the values of tensors on an accelerator, which is not waited for.
    """
    found = [(tuple(item.shape), str(item.dtype), _sample(item)) for item in tensors_in(batch)]
    return blake2b(repr(found).encode(), digest_size=8).hexdigest()


def _sample(tensor: Tensor) -> list[Any]:
    if not tensor.is_cpu or tensor.layout != torch.strided or not tensor.numel():
        return []
    values: list[Any] = tensor.detach().take(_places(tensor.numel())).tolist()
    return values


@lru_cache(maxsize=64)
def _places(count: int) -> Tensor:
    """Return where to look: at random, because padding and borders are the same everywhere."""
    return torch.randint(count, (_SAMPLED,), generator=torch.Generator().manual_seed(0))
