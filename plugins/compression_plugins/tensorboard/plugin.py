"""Options and hooks of the TensorBoard plugin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from compression_manager.configuration.checks import (
    require_integer,
    require_type,
    require_writable_folder,
)
from compression_manager.context import Context
from compression_manager.errors import ConfigError, blame_option
from compression_manager.metrics import Metric
from compression_manager.plugin import Plugin, PluginConfig, hookimpl, option
from compression_plugins.tensorboard.event_writer import EventWriter


@dataclass(frozen=True)
class TensorBoardConfig(PluginConfig):
    """Where and how often to write.

    Raises:
        ConfigError: an option of a wrong type or out of range.
    """

    plugin: ClassVar[str] = "tensorboard"

    directory: str | Path = field(
        metadata=option("Folder for the event files; one folder per training run.")
    )
    scalar_every_steps: int = field(
        default=1, metadata=option("Optimizer steps between points of a training curve.")
    )
    detail_every_steps: int | None = field(
        default=100,
        metadata=option("Optimizer steps between histograms and ranges; null: never."),
    )

    def __post_init__(self) -> None:
        require_type(self, "directory", self.directory, (str, Path))
        if not str(self.directory).strip():
            raise ConfigError("TensorBoardConfig.directory must name a folder, got an empty text.")
        require_integer(self, "scalar_every_steps", self.scalar_every_steps, minimum=1)
        if self.detail_every_steps is not None:
            require_integer(self, "detail_every_steps", self.detail_every_steps, minimum=1)


_FIRST_DETAILS = 2


class TensorBoardPlugin(Plugin[TensorBoardConfig]):
    """Writes metrics to event files, at the number of optimizer steps completed.

    A training curve gets one point per optimizer step; the losses of accumulated gradients are
    averaged into it. On resuming, points of a run that went further are superseded.
    """

    config_class = TensorBoardConfig

    def __init__(self, config: TensorBoardConfig) -> None:
        super().__init__(config)
        self._writer: EventWriter | None = None
        self._closes_with_manager = False
        # Optimizer steps at the begin of the present step; None outside of steps.
        self._step_start: int | None = None
        self._pending: dict[str, list[Metric]] = {}
        self._evaluation: dict[str, float] = {}

    @hookimpl
    def validate_composition(self, plugins: Sequence[Plugin[Any]]) -> None:
        """Refuse a folder that cannot be one, or that another instance writes to."""
        with blame_option("directory"):
            require_writable_folder(self.config.directory)
            self._check_not_shared(Path(self.config.directory), plugins)

    def _check_not_shared(self, directory: Path, plugins: Sequence[Plugin[Any]]) -> None:
        for other in plugins:
            if other is self or not isinstance(other, TensorBoardPlugin):
                continue
            if Path(other.config.directory).resolve() == directory.resolve():
                raise ConfigError(
                    f"plugins '{other.name}' and '{self.name}' both write to {directory}; give "
                    "each a directory of its own."
                )

    @hookimpl
    def on_train_begin(self, context: Context) -> None:
        """Open an event file that supersedes all points after the present position."""
        self._close()
        self._evaluation = {}
        self._step_start = None
        # The last evaluation before a checkpoint is written at the checkpoint's own step; the
        # continued run writes its first point one step later.
        first = context.global_step + 1 if context.global_step else 0
        self._writer = EventWriter(self.config.directory, first_step=first)
        self._close_with_manager(context)
        if context.global_step == 0:
            self._write_pending(self._writer, 0)
        self._pending = {}

    @hookimpl
    def on_step_begin(self, context: Context) -> None:
        """Remember the position, to tell accumulation from an update."""
        self._step_start = context.global_step

    @hookimpl
    def on_before_optimizer_step(self, context: Context) -> None:
        """Ask for histograms and ranges of the update that is about to happen.

        The second update is always among them: ranges have been observed by then, and short
        runs show them too.
        """
        interval, step = self.config.detail_every_steps, context.global_step + 1
        if interval is not None and (step % interval == 0 or step == _FIRST_DETAILS):
            context.request_details()

    @hookimpl
    def on_before_eval(self) -> None:
        """What is published from here on belongs to no step."""
        self._step_start = None

    @hookimpl
    def on_epoch_end(self) -> None:
        """Make everything so far readable."""
        self._step_start = None
        if self._writer is not None:
            self._writer.flush()

    @hookimpl
    def on_train_end(self, context: Context) -> None:
        """Write the recipe as hyperparameters, with the metrics of the last evaluation."""
        self._step_start = None
        if self._writer is not None:
            self._writer.hyperparameters(context.recipe, self._evaluation)
            self._writer.flush()

    @hookimpl
    def consume_metrics(self, context: Context, metrics: Sequence[Metric]) -> None:
        """Write what was published; before training begins, keep it until the file is open.

        Without training, for example after post-training quantization, closing the manager
        writes it.
        """
        self._close_with_manager(context)
        for metric in metrics:
            if metric.kind == "scalar":
                self._pending.setdefault(metric.name, []).append(metric)
            elif self._writer is not None:
                self._writer.tensor(metric, context.global_step)
        if self._writer is None or self._step_start == context.global_step:
            return  # while gradients accumulate, the point waits for the update
        if self._step_start is None or context.global_step % self.config.scalar_every_steps == 0:
            self._write_pending(self._writer, context.global_step)
        self._pending = {}

    def _write_pending(self, writer: EventWriter, step: int) -> None:
        for name, values in self._pending.items():
            mean = sum(metric.as_float() for metric in values) / len(values)
            writer.scalar(name, mean, step)
            if name.startswith("eval/"):
                self._evaluation[name] = mean

    def _close_with_manager(self, context: Context) -> None:
        if not self._closes_with_manager:
            self._closes_with_manager = True
            context.add_cleanup(lambda: self._finish(context), owner=self.name)

    def _finish(self, context: Context) -> None:
        if self._writer is None and self._pending:
            # What other runs wrote into the folder is not this one's to supersede.
            self._writer = EventWriter(self.config.directory, first_step=None)
            self._write_pending(self._writer, context.global_step)
        self._pending = {}
        self._close()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
