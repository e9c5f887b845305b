"""A plugin that implements every hook of the loop and does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from compression_manager import CompressionManager, Plugin, hookimpl
from compression_manager.context import Context
from compression_manager.loss import LossTerms
from compression_manager.metrics import Metric
from compression_manager.plugin import PluginConfig


@dataclass(frozen=True)
class EmptyConfig(PluginConfig):
    """Has no options."""

    plugin: ClassVar[str] = "empty"


class EmptyPlugin(Plugin[EmptyConfig]):
    """Asks for every parameter that a hook has."""

    config_class = EmptyConfig

    @hookimpl
    def on_train_begin(self, context: Context, dataloader: object) -> None:
        pass

    @hookimpl
    def on_epoch_begin(self, context: Context, epoch: int) -> None:
        pass

    @hookimpl
    def on_step_begin(self, context: Context, step: int) -> None:
        pass

    @hookimpl
    def on_after_compute_loss(
        self,
        context: Context,
        losses: LossTerms,
        input: Any,
        student_output: Any,
        teacher_output: Any,
        target: Tensor | None,
        mask: Tensor | None,
        sample_ids: Any,
        num_items: int | Tensor | None,
    ) -> None:
        pass

    @hookimpl
    def on_before_optimizer_step(self, context: Context) -> None:
        pass

    @hookimpl
    def on_after_optimizer_step(self, context: Context) -> None:
        pass

    @hookimpl
    def on_step_end(self, context: Context) -> None:
        pass

    @hookimpl
    def on_before_eval(self, context: Context) -> None:
        pass

    @hookimpl
    def on_after_eval(self, context: Context, metrics: Mapping[str, float]) -> None:
        pass

    @hookimpl
    def on_epoch_end(self, context: Context) -> None:
        pass

    @hookimpl
    def on_train_end(self, context: Context) -> None:
        pass

    @hookimpl
    def on_exception(self, context: Context, error: BaseException) -> None:
        pass

    @hookimpl
    def consume_metrics(self, context: Context, metrics: Sequence[Metric]) -> None:
        pass


def manager_with(count: int, model: nn.Module) -> CompressionManager:
    """Return a manager with so many empty plugins, whose training has begun."""
    plugins = [EmptyPlugin(EmptyConfig(name=f"empty{number}")) for number in range(count)]
    manager = CompressionManager(Context(model, recipe={}), plugins)
    manager.shape_model()
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    return manager
