"""Options of checkpointing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from compression_manager.errors import ConfigError
from compression_manager.plugin import PluginConfig, option


@dataclass(frozen=True)
class CheckpointConfig(PluginConfig):
    """When to save, where, and what to keep."""

    plugin: ClassVar[str] = "checkpoint"

    directory: str | Path = field(
        metadata=option("Folder in which each checkpoint gets a directory of its own.")
    )
    save_every_epochs: int | None = field(
        default=1, metadata=option("Save at the end of every N-th epoch; None for never.")
    )
    keep_best_n: int = field(
        default=1, metadata=option("Keep the N best by the metric, besides the newest.")
    )
    metric: str | None = field(
        default=None,
        metadata=option("Metric that on_after_eval records and that decides which is best."),
    )
    lower_is_better: bool = field(
        default=False, metadata=option("Whether the metric improves downwards, like a loss.")
    )
    save_every_steps: int | None = field(
        default=None, metadata=option("Save after every N-th optimizer step; None for never.")
    )
    keep_last: int = field(default=1, metadata=option("Keep the N newest."))

    def __post_init__(self) -> None:
        if not isinstance(self.directory, (str, os.PathLike)) or not str(self.directory):
            raise ConfigError(f"checkpoint: directory takes a path, got {self.directory!r}.")
        for name in ("save_every_epochs", "save_every_steps"):
            if getattr(self, name) is not None:
                self._check_number(name, minimum=1)
        if self.save_every_epochs is None and self.save_every_steps is None:
            raise ConfigError(
                "checkpoint: save_every_epochs and save_every_steps are both None, so nothing "
                "would be saved. Set one of them to a whole number from 1."
            )
        self._check_number("keep_best_n", minimum=0)
        self._check_number("keep_last", minimum=1)
        if self.metric is not None and (not isinstance(self.metric, str) or not self.metric):
            raise ConfigError(
                "checkpoint: metric takes the name of a metric that on_after_eval records, or "
                f"None, got {self.metric!r}."
            )
        if not isinstance(self.lower_is_better, bool):
            raise ConfigError(
                f"checkpoint: lower_is_better takes true or false, got {self.lower_is_better!r}."
            )

    def _check_number(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < minimum:
            raise ConfigError(
                f"checkpoint: {name} takes a whole number from {minimum}, got {value!r}."
            )
