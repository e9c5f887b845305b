"""The loop itself: what a user would write with the manager's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from compression_manager import CompressionManager
from compression_manager.models.calling import call_model
from compression_plugins.trainer.batches import Batch, unpack
from compression_plugins.trainer.evaluation import Criterion


@dataclass(frozen=True)
class Loop:
    """One training.

    Attributes:
        manager: whose hooks are called.
        loader: batches to train on.
        criterion: the task's loss.
        optimizer: takes a step per batch.
        scheduler: of its learning rate, or None.
        scheduler_interval: `epoch` or `step`.
        device: where batches go.
        evaluation: returns the metrics of the validation data.
        metric: the one that ReduceLROnPlateau follows.
    """

    manager: CompressionManager
    loader: Iterable[Any]
    criterion: Criterion
    optimizer: Optimizer
    scheduler: Any
    scheduler_interval: str
    device: torch.device | None
    evaluation: Callable[[], dict[str, float]]
    metric: str

    def run(self, epochs: int) -> None:
        """Train from the manager's position to the end of the last epoch."""
        manager = self.manager
        if not manager.model.training:  # parts that were set to eval on purpose stay so
            manager.model.train()
        for _ in manager.epochs(epochs):
            for _, item in manager.steps(self.loader):
                self._step(unpack(item, source="train_loader", device=self.device))
            manager.on_before_eval()
            metrics = self.evaluation()
            manager.on_after_eval(metrics)
            self._end_epoch(metrics)

    def _step(self, batch: Batch) -> None:
        manager = self.manager
        output = call_model(manager.model, batch.inputs)
        loss = manager.on_after_compute_loss(
            batch.inputs,
            output,
            self.criterion(output, batch.targets),
            target=batch.targets,
            sample_ids=batch.sample_ids,
        )
        torch.autograd.backward(loss)
        manager.on_before_optimizer_step()
        self.optimizer.step()
        manager.on_after_optimizer_step()
        self.optimizer.zero_grad()
        if self.scheduler is not None and self.scheduler_interval == "step":
            self.scheduler.step()

    def _end_epoch(self, metrics: dict[str, float]) -> None:
        # Before the epoch's end, where the checkpoint is written.
        if self.scheduler is None or self.scheduler_interval == "step":
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metrics[self.metric])
        else:
            self.scheduler.step()
