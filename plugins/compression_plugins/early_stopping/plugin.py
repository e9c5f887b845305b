"""Watches one metric of the evaluations and asks the loop to end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from compression_manager.context import Context
from compression_manager.errors import CheckpointMismatchError, ConfigError, suggest
from compression_manager.plugin import Plugin, hookimpl
from compression_plugins.early_stopping.config import EarlyStoppingConfig


class EarlyStoppingPlugin(Plugin[EarlyStoppingConfig]):
    """Stops after `patience` evaluations in a row without improvement.

    An evaluation improves if it beats the best one so far by more than `min_delta`; NaN never
    does. Publishes `early_stopping/best` and
    `early_stopping/evaluations_without_improvement` (with the instance's name in front).
    """

    config_class = EarlyStoppingConfig

    def __init__(self, config: EarlyStoppingConfig) -> None:
        super().__init__(config)
        self._best: float | None = None
        self._evaluations_without_improvement = 0
        self._resumed = False

    def required_hooks(self) -> frozenset[str]:
        """Return the hook that carries the metric."""
        return frozenset({"on_after_eval"})

    @hookimpl
    def on_train_begin(self, context: Context) -> None:
        """Start afresh, unless this training continues an earlier one."""
        if self._resumed:
            self._stop_if_exhausted(context)
        else:
            self._best = None
            self._evaluations_without_improvement = 0

    @hookimpl
    def on_epoch_begin(self) -> None:
        """Count the training as begun: until then another plugin may refuse to begin."""
        self._resumed = False

    @hookimpl
    def on_train_end(self) -> None:
        """Count it as begun in a loop without epochs too."""
        self._resumed = False

    @hookimpl
    def on_after_eval(self, context: Context, metrics: Mapping[str, float]) -> None:
        """Compare this evaluation with the best one.

        Raises:
            ConfigError: the evaluation did not record the metric.
        """
        if self.config.metric not in metrics:
            raise ConfigError(
                f"plugin '{self.name}' watches the metric {self.config.metric!r}, which "
                f"on_after_eval did not record; {suggest(self.config.metric, metrics)}"
            )
        value = float(metrics[self.config.metric])
        if self._improves(value):
            self._best = value
            self._evaluations_without_improvement = 0
        else:
            self._evaluations_without_improvement += 1
        if self._best is not None:
            context.metrics.scalar(f"{self.name}/best", self._best)
        context.metrics.scalar(
            f"{self.name}/evaluations_without_improvement",
            float(self._evaluations_without_improvement),
        )
        self._stop_if_exhausted(context)

    def state_dict(self) -> dict[str, Any]:
        """Return the metric's name, its best value and the evaluations since."""
        return {
            "metric": self.config.metric,
            "best": self._best,
            "evaluations_without_improvement": self._evaluations_without_improvement,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the checkpoint was.

        Raises:
            CheckpointMismatchError: the checkpoint watched another metric.
        """
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise CheckpointMismatchError(
                f"plugin '{self.name}' expects the state {', '.join(sorted(expected))}, but the "
                f"checkpoint holds {', '.join(sorted(state)) or 'nothing'} for it."
            )
        if state["metric"] != self.config.metric:
            raise CheckpointMismatchError(
                f"plugin '{self.name}' watches the metric {self.config.metric!r}, but in the "
                f"checkpoint it watched {state['metric']!r}; their values cannot be compared."
            )
        self._best = state["best"]
        self._evaluations_without_improvement = state["evaluations_without_improvement"]
        self._resumed = True

    def _improves(self, value: float) -> bool:
        if math.isnan(value) or self._best is None:
            return not math.isnan(value)
        better, worse = (self._best, value) if self.config.lower_is_better else (value, self._best)
        return _difference(better, worse) > Decimal(repr(float(self.config.min_delta)))

    def _stop_if_exhausted(self, context: Context) -> None:
        if self._evaluations_without_improvement >= self.config.patience:
            best = "no number yet" if self._best is None else f"best {self._best:g}"
            context.request_stop(
                f"plugin '{self.name}': {self.config.metric} did not improve by more than "
                f"{self.config.min_delta:g} in {self._evaluations_without_improvement} "
                f"evaluations ({best})"
            )


def _difference(left: float, right: float) -> Decimal:
    """Return `left - right` as written in decimals.

    In binary, 0.81 - 0.80 exceeds 0.01, which would count as an improvement by more.
    """
    if left == right:  # two equal infinities have no difference
        return Decimal(0)
    return Decimal(repr(left)) - Decimal(repr(right))
