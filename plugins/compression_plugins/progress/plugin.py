"""Options and hooks of the progress plugin."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from compression_manager.configuration.checks import require_not_negative, require_type
from compression_manager.context import Context
from compression_manager.metrics import Metric
from compression_manager.plugin import Plugin, PluginConfig, hookimpl, option
from compression_manager.progress_bar import ProgressBar
from compression_manager.tracking.batches import number_of_batches


@dataclass(frozen=True)
class ProgressConfig(PluginConfig):
    """How progress is shown.

    Raises:
        ConfigError: an option of a wrong type or out of range.
    """

    plugin: ClassVar[str] = "progress"

    refresh_seconds: float = field(
        default=0.2, metadata=option("Least time between two redraws of the bar.")
    )
    description: str | None = field(
        default=None, metadata=option("Text before the epoch's number, for example a model's name.")
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "refresh_seconds", self.refresh_seconds)
        require_type(self, "description", self.description, (str, type(None)))


class ProgressPlugin(Plugin[ProgressConfig]):
    """Shows one bar per epoch on stderr; without a terminal, one line per epoch."""

    config_class = ProgressConfig

    def __init__(self, config: ProgressConfig) -> None:
        super().__init__(config)
        self._bar: ProgressBar | None = None
        self._closes_with_manager = False
        self._batches: int | None = None
        self._completed = 0
        self._drawn_at = 0.0
        # Tensors until they are shown: reading one makes the host wait for the device.
        self._latest: dict[str, Metric] = {}

    @hookimpl
    def on_train_begin(self, context: Context, dataloader: object) -> None:
        """Learn how many batches an epoch has."""
        self._latest = {}
        self._batches = number_of_batches(
            context.tracked.get("dataloader") if dataloader is None else dataloader
        )
        if not self._closes_with_manager:
            self._closes_with_manager = True
            context.add_cleanup(self._close, owner=self.name)

    @hookimpl
    def on_epoch_begin(self, epoch: int) -> None:
        """Open the epoch's bar."""
        self._close()
        self._completed = 0
        self._bar = ProgressBar(
            total=self._batches,
            desc=self._title(epoch),
            disable=None,
            file=sys.stderr,
            dynamic_ncols=True,
            unit="step",
        )
        self._drawn_at = time.monotonic()

    @hookimpl
    def on_step_begin(self, step: int) -> None:
        """Redraw at most every `refresh_seconds`; the steps before this one are complete."""
        self._completed = step
        if time.monotonic() - self._drawn_at >= self.config.refresh_seconds:
            self._draw()

    @hookimpl
    def on_step_end(self) -> None:
        """Count the step; its loss is published only after this hook."""
        self._completed += 1

    @hookimpl
    def on_before_eval(self) -> None:
        """Show the state that is being evaluated."""
        self._draw()

    @hookimpl
    def on_epoch_end(self, context: Context) -> None:
        """Leave the finished bar, or a line, behind."""
        self._draw()
        if self._bar is not None and self._bar.disable:
            print(f"{self._title(context.epoch)}: {self._metrics()}", file=sys.stderr, flush=True)
        self._close()

    @hookimpl
    def on_exception(self) -> None:
        """Leave the bar as it is, so that the traceback starts on a line of its own."""
        self._close()

    @hookimpl
    def consume_metrics(self, metrics: Sequence[Metric]) -> None:
        """Keep the latest loss terms and evaluation metrics."""
        for metric in metrics:
            if metric.kind == "scalar" and metric.name.startswith(("loss/", "eval/")):
                self._latest[metric.name] = metric

    def _title(self, epoch: int) -> str:
        prefix = f"{self.config.description}, " if self.config.description else ""
        return f"{prefix}epoch {epoch}"

    def _metrics(self) -> str:
        return ", ".join(f"{name} {item.as_float():.4g}" for name, item in self._latest.items())

    def _draw(self) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.n = self._completed
            self._bar.set_postfix_str(self._metrics(), refresh=False)
            self._bar.refresh()
            self._drawn_at = time.monotonic()

    def _close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()
