"""Trainings with the ready loop: everything is built anew from seeds, as a new process would."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import toys
from compression_plugins import (
    CheckpointConfig,
    KnowledgeDistillationLossConfig,
    KnowledgeDistillationTrainer,
    TrainingHistory,
)

KL = KnowledgeDistillationLossConfig(4.0, ("CE", "KL"), (0.5, 0.5))
STEPS = 4


class Scripted:
    """Metrics that follow a script: the first value is that of the untrained student."""

    def __init__(self, *values: float, name: str = "score") -> None:
        self.values, self.name, self.calls = list(values), name, 0
        self.weights: list[dict[str, Any]] = []

    def __call__(self, model: nn.Module, loader: Any) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.weights.append(copy.deepcopy(model.state_dict()))
        self.calls += 1
        return {self.name: self.values[self.calls - 1]}


class Interrupted(Exception):
    """What ends a training in mid-epoch."""


class Failing:
    """A loader that raises before its `at`-th batch, counted over all epochs."""

    def __init__(self, loader: Any, at: int) -> None:
        self.loader, self.at, self.count = loader, at, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        for batch in self.loader:
            if self.count == self.at:
                raise Interrupted
            self.count += 1
            yield batch


def teacher() -> nn.Module:
    torch.manual_seed(1)
    return toys.ConvNet(8)


def student(seed: int = 2, dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(seed)
    return toys.ConvNet(dropout=dropout)


def train_loader() -> Any:
    return toys.loader(toys.images(8 * STEPS))


def validation_loader() -> Any:
    return toys.loader(toys.images(20, seed=1), shuffle=False)


def checkpoints(folder: Path, **options: Any) -> CheckpointConfig:
    return CheckpointConfig(folder / "checkpoints", **options)


def run(
    trainer: KnowledgeDistillationTrainer,
    model: nn.Module,
    epochs: int = 3,
    *,
    batches: Iterable[Any] | None = None,
    rate: float = 0.01,
    **options: Any,
) -> TrainingHistory:
    """Train with AdamW, without a bar."""
    return trainer.train(
        model,
        train_loader() if batches is None else batches,
        validation_loader(),
        epochs,
        torch.optim.AdamW(model.parameters(), rate),
        **{"progress": False, **options},
    )


def scores(history: TrainingHistory, name: str = "score") -> list[float]:
    return [item.metrics[name] for item in history.epochs]
