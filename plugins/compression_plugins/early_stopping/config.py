"""Options of early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from compression_manager.errors import ConfigError
from compression_manager.plugin import PluginConfig, option


@dataclass(frozen=True)
class EarlyStoppingConfig(PluginConfig):
    """Stop after `patience` evaluations in a row that did not beat the best one."""

    plugin: ClassVar[str] = "early_stopping"

    metric: str = field(metadata=option("Name of a metric that on_after_eval records."))
    min_delta: float = field(
        default=0.0,
        metadata=option("An evaluation counts as better only if it wins by more than this."),
    )
    patience: int = field(
        default=5, metadata=option("Evaluations in a row without improvement before stopping.")
    )
    lower_is_better: bool = field(
        default=False, metadata=option("Whether the metric improves downwards, like a loss.")
    )

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(
                "early_stopping: metric takes the name of a metric that on_after_eval records, "
                f"got {self.metric!r}."
            )
        if (
            isinstance(self.min_delta, bool)
            or not isinstance(self.min_delta, (int, float))
            or not 0 <= self.min_delta < math.inf
        ):
            raise ConfigError(
                "early_stopping: min_delta takes a finite number that is not negative, "
                f"got {self.min_delta!r}."
            )
        if type(self.patience) is not int or self.patience < 1:
            raise ConfigError(
                f"early_stopping: patience takes a whole number from 1, got {self.patience!r}."
            )
        if not isinstance(self.lower_is_better, bool):
            raise ConfigError(
                f"early_stopping: lower_is_better takes true or false, "
                f"got {self.lower_is_better!r}."
            )
