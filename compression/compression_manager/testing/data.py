"""Random data for the tiny models, the same for equal seeds."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from compression_manager.testing.models import CLASSES, VOCABULARY


def vectors(count: int = 32, seed: int = 0) -> TensorDataset:
    """Return `count` samples for `tiny_classifier`: (6,) float and a class."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=generator))


def images(count: int = 32, seed: int = 0) -> TensorDataset:
    """Return `count` samples for `tiny_convolution_network`: (1, 8, 8) float and a class."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=generator))


def tokens(count: int = 32, seed: int = 0, *, length: int = 5) -> TensorDataset:
    """Return `count` samples for `tiny_transformer`: (length,) int64 and as many classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(VOCABULARY, (count, length), generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (count, length), generator=generator))


def loader(dataset: TensorDataset, *, batch_size: int = 8, shuffle: bool = True) -> DataLoader[Any]:
    """Return a loader of batches `[inputs, targets]`, shuffled by torch's global generator."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)
