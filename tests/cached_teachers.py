"""What the tests of the teacher cache share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import toys
from compression_plugins import IndexedDataset, TeacherCache
from toy_teachers import CountingTeacher

SAMPLES = 50


def counting_teacher(classes: int = toys.CLASSES, seed: int = 0) -> CountingTeacher:
    torch.manual_seed(seed)
    return CountingTeacher(toys.mlp(16, classes))


def loader(samples: int = SAMPLES, **options: Any) -> DataLoader[Any]:
    return DataLoader(IndexedDataset(toys.vectors(samples)), **{"batch_size": 8, **options})


def live(teacher: nn.Module, ids: Tensor, samples: int = SAMPLES) -> Tensor:
    with torch.no_grad():
        return teacher(toys.vectors(samples).tensors[0][ids])


def batch(ids: Sequence[int], inputs: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that follow from the ids unless given."""
    sample_ids = torch.tensor(ids)
    if inputs is None:
        inputs = torch.stack([_input(sample) for sample in ids])
    return inputs, torch.zeros(len(ids)), sample_ids


def _input(sample: int) -> Tensor:
    return torch.randn(6, generator=torch.Generator().manual_seed(sample % 2**31))


def built(directory: Path, teacher: nn.Module, **options: Any) -> TeacherCache:
    """Every sample of `loader()`, in shards of 16."""
    cache = TeacherCache(directory, shard_size=16, **options)
    cache.build(teacher, loader())
    return cache
