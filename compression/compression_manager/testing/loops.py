"""Training loops that place every hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from compression_manager.manager import CompressionManager
from compression_manager.models.calling import call_model

LossArguments = Callable[[Any], Mapping[str, Any]]


def train(
    manager: CompressionManager,
    batches: Iterable[Any],
    optimizer: Optimizer,
    epochs: int,
    *,
    loss_arguments: LossArguments | None = None,
    after_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[float]:
    """Train with `manager.epochs` and `manager.steps`, from the manager's position on.

    Args:
        manager: of the model.
        batches: pairs of inputs and targets (class numbers), gone through once an epoch.
        optimizer: of the model.
        epochs: where training ends, counted from the very first epoch.
        loss_arguments: batch -> what is passed to `on_after_compute_loss` by keyword.
        after_step: called with epoch, step and loss at the end of each step's body.

    Returns:
        The loss of every step, plugins' terms included. That of an epoch's last step is also its
        evaluation's metric `loss`.
    """
    losses = []
    for epoch in manager.epochs(epochs):
        manager.model.train()
        for step, batch in manager.steps(batches):
            loss = _compute_loss(manager, batch, loss_arguments)
            loss.backward()
            _update(manager, optimizer)
            losses.append(float(loss.detach()))
            if after_step is not None:
                after_step(epoch, step, loss)
        _evaluate(manager, losses[-1])
    return losses


def train_with_hooks(
    manager: CompressionManager,
    batches: Iterable[Any],
    optimizer: Optimizer,
    epochs: int,
    *,
    loss_arguments: LossArguments | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> list[float]:
    """Train as `train` does, with one call for each hook; `after_epoch` follows an epoch's end."""
    losses = []
    manager.on_train_begin(batches)
    for epoch in range(manager.position.epoch, epochs):
        manager.on_epoch_begin(epoch)
        manager.model.train()
        for step, batch in enumerate(batches):
            manager.on_step_begin(step)
            loss = _compute_loss(manager, batch, loss_arguments)
            loss.backward()
            _update(manager, optimizer)
            losses.append(float(loss.detach()))
            manager.on_step_end()
        _evaluate(manager, losses[-1])
        manager.on_epoch_end()
        if after_epoch is not None:
            after_epoch(epoch)
        if manager.should_stop:
            break
    manager.on_train_end()
    return losses


def train_without_optional_hooks(
    manager: CompressionManager,
    batches: Iterable[Any],
    optimizer: Optimizer,
    *,
    loss_arguments: LossArguments | None = None,
) -> list[float]:
    """Train through `batches` once, with two losses for each update and required hooks only."""
    losses = []
    manager.on_train_begin()
    manager.model.train()
    for step, batch in enumerate(batches):
        manager.on_step_begin(step)
        for _ in range(2):
            loss = _compute_loss(manager, batch, loss_arguments)
            (loss / 2).backward()
            losses.append(float(loss.detach()))
        manager.on_before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        manager.on_step_end()
    manager.on_train_end()
    return losses


def _compute_loss(
    manager: CompressionManager, batch: Any, loss_arguments: LossArguments | None
) -> Tensor:
    inputs, targets = batch
    output = call_model(manager.model, inputs)
    task = F.cross_entropy(output.flatten(0, -2), targets.flatten())
    given = {} if loss_arguments is None else loss_arguments(batch)
    return manager.on_after_compute_loss(inputs, output, task, **given)


def _update(manager: CompressionManager, optimizer: Optimizer) -> None:
    manager.on_before_optimizer_step()
    optimizer.step()
    manager.on_after_optimizer_step()
    optimizer.zero_grad()


def _evaluate(manager: CompressionManager, loss: float) -> None:
    manager.on_before_eval()
    manager.on_after_eval({"loss": loss})
