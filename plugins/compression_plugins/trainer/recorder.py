"""The trainer's own plugin: writes the history and keeps the weights of the best epoch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compression_manager.context import Context
from compression_manager.errors import CheckpointMismatchError, ConfigError, suggest
from compression_manager.loss import LossTerms
from compression_manager.plugin import Plugin, PluginConfig, hookimpl
from compression_manager.quantization.layers import QuantizedLayer
from compression_plugins.trainer.history import EpochRecord, TrainingHistory, better


@dataclass(frozen=True)
class RecorderConfig(PluginConfig):
    """Which metric decides."""

    plugin: ClassVar[str] = "training_history"

    metric: str
    lower_is_better: bool


class Recorder(Plugin[RecorderConfig]):
    """Its state is part of every checkpoint, so that a resumed training has the whole history.

    Attributes:
        initial_metrics: what was measured before training; the trainer sets it.
    """

    config_class = RecorderConfig

    def __init__(self, config: RecorderConfig) -> None:
        super().__init__(config)
        self.initial_metrics: dict[str, float] = {}
        self._epochs: list[EpochRecord] = []
        self._metrics: dict[str, float] = {}
        self._best_epoch: int | None = None
        self._best_value: float | None = None
        self._best_weights: dict[str, Any] | None = None
        # Fake quantizers that were on in the best epoch: a float epoch is no rival of one with
        # quantization, which is what will be deployed.
        self._best_quantizing = 0
        # float64 sums over the epoch's steps, on the losses' device: reading them would wait.
        self._sums: dict[str, Tensor | float] = {}
        self._steps = 0

    @hookimpl(trylast=True)
    def on_after_compute_loss(self, losses: LossTerms) -> None:
        """Add up the terms; at this point all plugins have added theirs."""
        total: Tensor | float = 0.0
        for term in losses:
            value = term.value.detach().reshape(()).to(torch.float64)
            total = total + term.weight * value
            self._sums[term.name] = self._sums.get(term.name, 0.0) + value
        self._sums["total"] = self._sums.get("total", 0.0) + total
        self._steps += 1

    @hookimpl
    def on_after_eval(self, context: Context, metrics: Mapping[str, float]) -> None:
        """Keep the weights if they are the best so far."""
        check_recorded(self.config.metric, metrics)
        self._metrics = dict(metrics)
        value, quantizing = metrics[self.config.metric], _quantizing(context.model)
        if quantizing > self._best_quantizing:
            self._best_epoch = self._best_value = self._best_weights = None
            self._best_quantizing = quantizing
        if better(value, self._best_value, lower_is_better=self.config.lower_is_better):
            self._best_epoch, self._best_value = context.epoch, value
            self._best_weights = {
                name: tensor.detach().clone() if isinstance(tensor, Tensor) else tensor
                for name, tensor in context.model.state_dict().items()
            }

    @hookimpl
    def on_epoch_end(self, context: Context) -> None:
        """Write the epoch's entry, before the checkpoint plugin saves."""
        losses = {name: float(value) / self._steps for name, value in self._sums.items()}
        self._epochs.append(
            EpochRecord(context.epoch, context.global_step, losses, dict(self._metrics))
        )
        self._sums, self._steps = {}, 0

    @hookimpl(tryfirst=True)  # what others do in the end, they do to the weights that stay
    def on_train_end(self, context: Context) -> None:
        """Load the best epoch's weights; without one the model stays as it is."""
        if self._best_weights is not None:
            context.model.load_state_dict(self._best_weights)

    def history(self, stop_reason: str | None) -> TrainingHistory:
        """Return what was recorded."""
        return TrainingHistory(
            metric=self.config.metric,
            lower_is_better=self.config.lower_is_better,
            initial_metrics=dict(self.initial_metrics),
            epochs=tuple(self._epochs),
            best_epoch=self._best_epoch,
            stop_reason=stop_reason,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the history so far, the best weights, and the sums of the present epoch."""
        return {
            "metric": self.config.metric,
            "lower_is_better": self.config.lower_is_better,
            "initial_metrics": dict(self.initial_metrics),
            "epochs": [dataclasses.asdict(item) for item in self._epochs],
            "best_epoch": self._best_epoch,
            "best_value": self._best_value,
            "best_weights": self._best_weights,
            "best_quantizing": self._best_quantizing,
            "sums": {name: float(value) for name, value in self._sums.items()},
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the history of a checkpoint.

        Raises:
            CheckpointMismatchError: it is not from a trainer, or the metric was another one.
        """
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise CheckpointMismatchError(
                "the checkpoint holds no history of a KnowledgeDistillationTrainer; continue it "
                "with the loop that wrote it."
            )
        saved = state["metric"], state["lower_is_better"]
        if saved != (self.config.metric, self.config.lower_is_better):
            raise CheckpointMismatchError(
                f"the best epoch is chosen by the metric {self.config.metric!r} "
                f"(lower_is_better={self.config.lower_is_better}), but in the checkpoint it was "
                f"{saved[0]!r} (lower_is_better={saved[1]}); their values cannot be compared."
            )
        self.initial_metrics = dict(state["initial_metrics"])
        self._epochs = [EpochRecord(**item) for item in state["epochs"]]
        self._best_epoch, self._best_value = state["best_epoch"], state["best_value"]
        self._best_weights = copy.copy(state["best_weights"])
        self._best_quantizing = state["best_quantizing"]
        self._sums, self._steps = dict(state["sums"]), state["steps"]


def _quantizing(model: nn.Module) -> int:
    return sum(
        quantizer.phase.quantizing
        for module in model.modules()
        if isinstance(module, QuantizedLayer)
        for quantizer in module.quantizers()
    )


def check_recorded(metric: str, metrics: Mapping[str, float]) -> None:
    """Raise ConfigError unless `metrics` holds the metric that decides."""
    if metric not in metrics:
        raise ConfigError(
            f"the best epoch is chosen by the metric {metric!r}, which the evaluation does not "
            f"record; {suggest(metric, metrics)} Choose one with "
            "KnowledgeDistillationTrainer(metric=..., lower_is_better=...) or in its "
            "checkpoint_config, or have the function metrics=... return it."
        )
