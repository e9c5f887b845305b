"""Options and hooks of the BatchNorm re-estimation plugin."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from compression_manager.configuration.checks import require_integer
from compression_manager.context import Context
from compression_manager.errors import ConfigError
from compression_manager.plugin import Plugin, PluginConfig, hookimpl, option
from compression_manager.progress_bar import ProgressBar
from compression_manager.tracking.batches import inputs_of, number_of_batches, undisturbed
from compression_plugins.batch_norm.loader import check_loader
from compression_plugins.batch_norm.reestimation import layers_with_statistics, reestimate


@dataclass(frozen=True)
class BatchNormReestimationConfig(PluginConfig):
    """Estimate BatchNorm's running statistics anew when training ends.

    The running averages of training follow weights that changed meanwhile; with few bits they
    are far from what the final, quantized weights produce.

    Raises:
        ConfigError: an option of a wrong type or out of range.
    """

    plugin: ClassVar[str] = "batch_norm_reestimation"

    batches: int = field(
        default=100, metadata=option("Batches to average over; fewer if the loader has fewer.")
    )
    dataloader: Any = field(
        default=None,
        metadata=option("Source of the batches; null: the training's own loader.", runtime=True),
    )
    get_inputs: Callable[[Any], Any] | None = field(
        default=None,
        metadata=option(
            "Returns from a batch what the model is called with; null: the first of a pair, "
            "a mapping without its labels, else the batch.",
            runtime=True,
        ),
    )

    def __post_init__(self) -> None:
        require_integer(self, "batches", self.batches, minimum=1)
        if self.get_inputs is not None and not callable(self.get_inputs):
            raise ConfigError(
                "BatchNormReestimationConfig.get_inputs must be a function of a batch, got "
                f"{type(self.get_inputs).__name__}."
            )
        if self.dataloader is not None:
            check_loader(self.dataloader, plugin=self.name or self.plugin)
            if not isinstance(self.dataloader, Iterable):
                raise ConfigError(
                    "BatchNormReestimationConfig.dataloader must be an iterable of batches, got "
                    f"{type(self.dataloader).__name__}."
                )


class BatchNormReestimationPlugin(Plugin[BatchNormReestimationConfig]):
    """Runs batches through the trained model, and shows a bar on a terminal meanwhile."""

    config_class = BatchNormReestimationConfig
    roles = frozenset({"batch_norm_reestimation"})

    def __init__(self, config: BatchNormReestimationConfig) -> None:
        super().__init__(config)
        self._loader: Any = None

    @hookimpl
    def validate_composition(self, context: Context) -> None:
        """Refuse a model without statistics."""
        if not layers_with_statistics(context.model):
            raise ConfigError(
                f"plugin '{self.name}' found no BatchNorm layer with running statistics in the "
                "model; leave it out of the list."
            )

    @hookimpl
    def on_train_begin(self, dataloader: object) -> None:
        """Refuse to start without batches, rather than fail at the end."""
        loader = dataloader if self.config.dataloader is None else self.config.dataloader
        check_loader(loader, plugin=self.name)
        self._loader = loader

    @hookimpl
    def on_train_end(self, context: Context) -> None:
        """Estimate the statistics."""
        with undisturbed(self._loader):
            count = reestimate(context.model, self._inputs())
        if count == 0:
            raise ConfigError(
                f"plugin '{self.name}': the data loader ({type(self._loader).__name__}) yielded no "
                "batch, so that the BatchNorm statistics are those of training."
            )

    def _inputs(self) -> Iterator[Any]:
        bar = ProgressBar(
            itertools.islice(self._loader, self.config.batches),
            total=number_of_batches(self._loader, self.config.batches),
            desc="BatchNorm statistics",
            disable=None,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=False,
            unit="batch",
        )
        with bar:
            for batch in bar:
                yield self._inputs_in(batch)

    def _inputs_in(self, batch: Any) -> Any:
        if self.config.get_inputs is not None:
            return self.config.get_inputs(batch)
        return inputs_of(
            batch,
            source=f"plugin '{self.name}'s data loader",
            otherwise="BatchNormReestimationConfig(get_inputs=lambda batch: ...)",
        )
