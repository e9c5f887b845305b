"""Tiny models, data and loops that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compression_manager import CompressionManager

CLASSES = 4


class ConvNet(nn.Module):
    """Two conv-BatchNorm blocks and a classifier; input (N, 1, 8, 8), output (N, 4)."""

    def __init__(self, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width * 16, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(input)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        return self.fc(self.dropout(hidden.flatten(1)))


def mlp(hidden: int = 8, classes: int = CLASSES) -> nn.Sequential:
    """Input (N, 6), output (N, classes)."""
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def images(count: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=generator))


def vectors(count: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=generator))


def loader(dataset: TensorDataset, *, batch_size: int = 8, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


def train(
    manager: CompressionManager,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    after_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[float]:
    """The loop of the README, with `epochs` and `steps`; returns the losses."""
    model = manager.model
    losses = []
    for epoch in manager.epochs(epochs):
        model.train()
        for step, (inputs, targets) in manager.steps(batches):
            output = model(inputs)
            loss = F.cross_entropy(output, targets)
            loss = manager.on_after_compute_loss(inputs, output, loss)
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if after_step is not None:
                after_step(epoch, step, loss)
        manager.on_before_eval()
        manager.on_after_eval({"loss": losses[-1]})
    return losses


def assert_identical(actual: Any, expected: Any, path: str = "state") -> None:
    """Compare nested mappings and sequences bit for bit."""
    assert type(actual) is type(expected), path
    if isinstance(expected, Tensor):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), path
        assert torch.equal(actual.isnan(), expected.isnan()), path
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num()), path
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), path
        for key, value in expected.items():
            assert_identical(actual[key], value, f"{path}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), path
        for index, value in enumerate(expected):
            assert_identical(actual[index], value, f"{path}[{index}]")
    else:
        assert repr(actual) == repr(expected), path
