"""A training loop of single steps, with or without a manager."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager import CompressionManager, prepare_compression
from compression_manager.plugin import PluginConfig


class Trainer:
    """Trains a model, a step at a time: the README's loop, with every hook.

    Args:
        model: is changed in place.
        configs: of the plugins; none: a plain loop without a manager.
        optimizer: default: stochastic gradient descent with momentum, the cheapest in use, so that
            its cost, the same on both sides, flatters no ratio.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Sequence[PluginConfig] = (),
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model = model.train()
        self.manager: CompressionManager | None = None
        if configs:
            self.manager = prepare_compression(model, list(configs))
        self.optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        if self.manager is not None:
            self.manager.on_train_begin()
            self.manager.on_epoch_begin(0)

    def loss(self, number: int, inputs: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
        """Begin a step: return its loss."""
        if self.manager is not None:
            self.manager.on_step_begin(number)
        output = self.model(inputs)
        loss = F.cross_entropy(output, targets)
        if self.manager is not None:
            loss = self.manager.on_after_compute_loss(inputs, output, loss, sample_ids=ids)
        return loss

    def update(self, loss: Tensor) -> None:
        """End a step: backward, and the optimizer's step."""
        loss.backward()
        if self.manager is not None:
            self.manager.on_before_optimizer_step()
        self.optimizer.step()
        if self.manager is not None:
            self.manager.on_after_optimizer_step()
        self.optimizer.zero_grad()
        if self.manager is not None:
            self.manager.on_step_end()

    def step(self, number: int, inputs: Tensor, targets: Tensor, ids: Tensor) -> float:
        """Make one step; return the loss."""
        loss = self.loss(number, inputs, targets, ids)
        self.update(loss)
        return loss.item()
