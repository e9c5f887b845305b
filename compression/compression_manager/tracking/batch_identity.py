"""Telling one batch from another by a few of its numbers."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from compression_manager.models.calling import tensors_in
from compression_manager.sampling import sample

_SAMPLED = 8


def identity_of(batch: Any) -> str:
    """Return what other batches hardly share: of shapes, types and a few values of its tensors.

    Args:
        batch: tensors in a nesting of mappings, lists, tuples and dataclasses; all else is ignored,
            and so are the values of tensors on an accelerator, which is not waited for, and of
            other classes than torch.Tensor.
    """
    found = [(_shape(item), str(item.dtype), _sample(item)) for item in tensors_in(batch)]
    return blake2b(repr(found).encode(), digest_size=8).hexdigest()


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if tensor.is_nested else tuple(tensor.shape)


def _sample(tensor: Tensor) -> list[Any]:
    is_plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_nested
    return sample(tensor.detach(), _SAMPLED) if is_plain and tensor.is_cpu else []
