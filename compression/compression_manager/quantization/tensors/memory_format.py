"""Tensors in the order in which their elements lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

# Number of dimensions -> the format in which all channels of a place lie together.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_dense(tensor: Tensor) -> bool:
    """Return whether `tensor` is contiguous or channels_last, the formats that kernels take."""
    if tensor.is_contiguous():
        return True
    last = _CHANNELS_LAST.get(tensor.dim())
    return last is not None and tensor.is_contiguous(memory_format=last)


def dense(tensor: Tensor) -> Tensor:
    """Return `tensor` in one of these formats: a copy if need be."""
    return tensor if is_dense(tensor) else tensor.contiguous()


def with_channels_last(tensor: Tensor) -> Tensor:
    """Return a batch of images or volumes channels_last; a tensor of other dimensions itself."""
    last = _CHANNELS_LAST.get(tensor.dim())
    return tensor if last is None else tensor.contiguous(memory_format=last)


def has_gaps(tensor: Tensor) -> bool:
    """Return whether elements have gaps between them in memory, or overlap."""
    return not torch.ops.aten.is_non_overlapping_and_dense(tensor)


def formatted_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return `tensor` in the format of `other`, which is dense: a copy if need be."""
    if other.is_contiguous():
        return tensor.contiguous()
    return tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return all elements of a dense tensor in one dimension, as a view."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def strided_copy(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return a copy of `tensor` whose elements lie in memory as these strides say."""
    empty = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)
