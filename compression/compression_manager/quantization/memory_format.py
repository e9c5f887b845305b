"""Tensors in the order in which their elements lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Return whether `tensor` is contiguous or channels_last, the formats that kernels take."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def dense(tensor: Tensor) -> Tensor:
    """Return `tensor` in one of these formats: a copy if need be."""
    return tensor if is_dense(tensor) else tensor.contiguous()


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return all elements of a dense tensor in one dimension, as a view."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
