"""What the tests of distillation share: teachers that count, and a loop up to its first loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import toys
from compression_manager import CompressionManager
from compression_plugins import KnowledgeDistillationLossConfig


class CountingTeacher(nn.Module):
    """Keeps what it was called with; `wrap` turns its logits into what it returns."""

    def __init__(self, inner: nn.Module, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.inner = inner
        self.wrap = wrap
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        first = [*args, *kwargs.values()][0]
        return self.wrap(self.inner(first))


def criterion(
    loss: str = "KL", temperature: float = 1.0, weights: tuple[float, float] = (0.5, 0.5)
) -> KnowledgeDistillationLossConfig:
    return KnowledgeDistillationLossConfig(temperature, ("CE", loss), weights)


def begin(manager: CompressionManager) -> CompressionManager:
    """Enter the first step."""
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    manager.on_step_begin(0)
    return manager


def first_loss(
    manager: CompressionManager, inputs: Any, output: Any = None, teacher_output: Any = None
) -> Tensor:
    """The loss of the first step for a student that returned `output` (default: zeros)."""
    output = torch.zeros(4, toys.CLASSES, requires_grad=True) if output is None else output
    task = torch.zeros((), requires_grad=True)
    return begin(manager).on_after_compute_loss(inputs, output, task, teacher_output)


def published(manager: CompressionManager) -> dict[str, float]:
    """The scalars that wait for delivery at the end of the step."""
    return {metric.name: metric.as_float() for metric in manager._context.metrics.drain()}


def condition(model: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    """The modes of all modules and the requires_grad of all parameters, by name."""
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )
