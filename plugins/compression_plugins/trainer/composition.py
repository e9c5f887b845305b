"""From the trainer's arguments to the list of plugin configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from compression_manager.errors import ConfigError
from compression_manager.plugin_host.composition import PluginSpec
from compression_plugins.checkpoint import CheckpointConfig
from compression_plugins.distillation import DistillationConfig
from compression_plugins.distillation.criteria import CriterionConfig
from compression_plugins.early_stopping import EarlyStoppingConfig
from compression_plugins.progress import ProgressConfig
from compression_plugins.trainer.evaluation import DEFAULT_METRICS
from compression_plugins.trainer.recorder import Recorder, check_recorded


def deciding_metric(
    metric: str | None, lower_is_better: bool, checkpoints: CheckpointConfig | None
) -> tuple[str, bool]:
    """Return the metric that decides, and whether lower is better.

    Raises:
        ConfigError: the trainer and its checkpoint config name different ones.
    """
    named = None if checkpoints is None or checkpoints.metric is None else checkpoints
    if metric is None:
        return ("loss", True) if named is None else (str(named.metric), named.lower_is_better)
    if named is not None and (named.metric, named.lower_is_better) != (metric, lower_is_better):
        raise ConfigError(
            f"the trainer's metric is {metric!r} (lower_is_better={lower_is_better}), that of "
            f"checkpoint_config {named.metric!r} (lower_is_better={named.lower_is_better}); one "
            "metric decides, so give it in one place."
        )
    return metric, lower_is_better


def distillation_configs(teacher: nn.Module, strategy: Any) -> list[DistillationConfig]:
    """Return a config per criterion; all have the same teacher, which runs once per step.

    In self-distillation the student is its own teacher, and the other one has no part.

    Raises:
        ConfigError: the strategy is empty, or holds what is no criterion.
    """
    criteria = list(strategy) if isinstance(strategy, (list, tuple)) else [strategy]
    if not criteria:
        raise ConfigError(
            "strategy is empty; pass a criterion of DistillationConfig, such as "
            "KnowledgeDistillationLossConfig(temperature=4), or a list of them."
        )
    for criterion in criteria:
        if not isinstance(criterion, CriterionConfig):
            raise ConfigError(
                "strategy takes a criterion of DistillationConfig, such as "
                "KnowledgeDistillationLossConfig(temperature=4), or a list of them, got "
                f"{criterion!r}."
            )
    return [
        DistillationConfig(teacher if criterion.needs_teacher else None, criterion=criterion)
        for criterion in criteria
    ]


def with_metric(
    config: CheckpointConfig | None, metric: str, lower_is_better: bool
) -> CheckpointConfig | None:
    """Return the config with the metric that decides; None if it is switched off."""
    if config is None or not config.enabled:
        return None
    return dataclasses.replace(config, metric=metric, lower_is_better=lower_is_better)


def with_further(
    configs: Sequence[PluginSpec], own: Iterable[PluginSpec | None], *, progress: bool
) -> list[PluginSpec]:
    """Return the user's further configs and the trainer's own ones.

    Raises:
        ConfigError: `configs` is no list, or holds what belongs to the trainer.
    """
    if isinstance(configs, (str, bytes)) or not isinstance(configs, Sequence):
        raise ConfigError(
            "configs takes a list of plugin configs, for example [QATConfig()], got "
            f"{type(configs).__name__}."
        )
    if any(isinstance(item, CheckpointConfig) for item in configs):
        raise ConfigError(
            "checkpoints belong to the trainer: pass the CheckpointConfig as "
            "KnowledgeDistillationTrainer(checkpoint_config=...), where resume finds it."
        )
    shown = any(isinstance(item, ProgressConfig) for item in configs)
    bar = [ProgressConfig()] if progress and not shown else []
    return [*configs, *(item for item in own if item is not None), *bar]


def check_default_metric(metric: str, lower_is_better: bool) -> None:
    """Raise ConfigError unless the default metrics hold this one, with this direction."""
    check_recorded(metric, DEFAULT_METRICS)
    if DEFAULT_METRICS[metric] != lower_is_better:
        raise ConfigError(
            f"of the default metric {metric!r} "
            f"{'lower' if DEFAULT_METRICS[metric] else 'higher'} is better; set "
            f"lower_is_better={DEFAULT_METRICS[metric]} where the metric is chosen."
        )


def check_metrics(plugins: Iterable[object], metrics: Mapping[str, float]) -> None:
    """Raise ConfigError if a plugin watches a metric that the evaluation does not record."""
    for plugin in plugins:
        if isinstance(plugin, Recorder):
            check_recorded(plugin.config.metric, metrics)
        elif isinstance(plugin, EarlyStoppingConfig) and plugin.enabled:
            check_recorded(plugin.metric, metrics)
