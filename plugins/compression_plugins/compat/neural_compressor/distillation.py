"""Distillation configs of Neural Compressor, as configs of the distillation plugin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import compression_plugins as plugins
from compression_manager.errors import ConfigError
from compression_plugins.compat.neural_compressor import config as compat
from compression_plugins.compat.neural_compressor.model import unwrapped
from compression_plugins.compat.neural_compressor.outputs import (
    AsLogits,
    NamedOutput,
    PassedOutputs,
)

_FEATURES = (
    compat.IntermediateLayersKnowledgeDistillationLossConfig,
    compat.SelfKnowledgeDistillationLossConfig,
)


def translate_distillers(
    configs: Sequence[compat.DistillationConfig], passed: PassedOutputs
) -> list[plugins.DistillationConfig]:
    """Return one config of the plugin for each.

    Args:
        configs: all of a manager, because the task's own loss is counted once in their sum: as
            one that weights it says, else whole if any asks for it.
        passed: where the loop's teacher outputs will be.

    Raises:
        ConfigError: a value is invalid.
    """
    criteria = [config.criterion for config in configs]
    weighted = any(not isinstance(criterion, _FEATURES) for criterion in criteria)
    asked = any(getattr(criterion, "add_origin_loss", False) for criterion in criteria)
    return [_translate(config, weighted or asked, passed) for config in configs]


def names_l2(configs: Sequence[compat.DistillationConfig]) -> bool:
    """Return whether a criterion names the loss 'L2'."""
    return any("L2" in getattr(config.criterion, "loss_types", ()) for config in configs)


def _translate(
    config: compat.DistillationConfig, keeps_task_loss: bool, passed: PassedOutputs
) -> plugins.DistillationConfig:
    given = config.criterion
    if isinstance(given, compat.SelfKnowledgeDistillationLossConfig):
        return plugins.DistillationConfig(criterion=_outputs(given, keeps_task_loss, passed))
    criterion: Any = given
    if isinstance(given, compat.KnowledgeDistillationLossConfig):
        criterion = plugins.KnowledgeDistillationLossConfig(
            temperature=given.temperature,
            loss_types=given.loss_types,
            loss_weights=given.loss_weights,
        )
    elif isinstance(given, compat.IntermediateLayersKnowledgeDistillationLossConfig):
        criterion = _layers(given, keeps_task_loss)
    if config.teacher_model is None:
        return plugins.DistillationConfig(criterion=criterion, teacher_outputs="caller")
    return plugins.DistillationConfig(
        unwrapped(config.teacher_model),
        criterion=criterion,
        teacher_forward=passed.teacher_forward,
    )


def _layers(
    given: compat.IntermediateLayersKnowledgeDistillationLossConfig, keeps_task_loss: bool
) -> plugins.IntermediateLayersKnowledgeDistillationLossConfig:
    types = _each(given, "loss_types") or ["MSE"] * len(_each(given, "layer_mappings"))
    mappings = [
        _mapping(item, is_divergence=index < len(types) and types[index] == "KL")
        for index, item in enumerate(given.layer_mappings)
    ]
    return plugins.IntermediateLayersKnowledgeDistillationLossConfig(
        layer_mappings=mappings,
        loss_types=types,
        loss_weights=_each(given, "loss_weights") or None,
        add_origin_loss=_task_loss(given, keeps_task_loss),
        class_dimension=-1,  # as 2.6 has it for features of any shape
    )


def _mapping(item: Any, *, is_divergence: bool) -> Any:
    """Return a mapping in the plugin's form; what is no mapping stays, for its error message."""
    points = [item] if isinstance(item, str) else item
    if not isinstance(points, (list, tuple)):
        return item
    return [_point(point, is_divergence) for point in points]


def _point(point: Any, is_divergence: bool) -> Any:
    parts = [point] if isinstance(point, str) else point
    if not isinstance(parts, (list, tuple)) or len(parts) not in (1, 2):
        return point
    output = _output(parts[1] if len(parts) == 2 else "")
    return [parts[0], AsLogits(output) if is_divergence else output]


def _output(process: Any) -> int | str | Callable[[Any], Any] | None:
    if isinstance(process, str):
        return int(process) if process.isdecimal() else process or None
    output: int | Callable[[Any], Any] | None = process
    return output


def _outputs(
    given: compat.SelfKnowledgeDistillationLossConfig,
    keeps_task_loss: bool,
    passed: PassedOutputs,
) -> plugins.SelfKnowledgeDistillationLossConfig:
    def point(name: Any, group: int) -> Any:
        if not isinstance(name, str):
            return name
        # 2.6 knows the soft labels by their place.
        return ["", NamedOutput(name, passed, given.temperature if group == 1 else 1.0)]

    if not given.temperature > 0:
        raise ConfigError(
            "SelfKnowledgeDistillationLossConfig.temperature must be above 0, got "
            f"{given.temperature!r}."
        )
    groups = [
        [[point(name, index) for name in pair] for pair in group]
        for index, group in enumerate(_each(given, "layer_mappings"))
    ]
    return plugins.SelfKnowledgeDistillationLossConfig(
        layer_mappings=groups,
        loss_types=_each(given, "loss_types") or "CE",
        loss_weights=_each(given, "loss_weights") or None,
        add_origin_loss=_task_loss(given, keeps_task_loss),
        class_dimension=-1,
    )


def _each(given: Any, name: str) -> list[Any]:
    value = getattr(given, name)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{type(given).__name__}.{name} must be a list, got {value!r}.")
    return list(value)


def _task_loss(given: Any, keeps_task_loss: bool) -> bool:
    if not isinstance(given.add_origin_loss, bool):
        raise ConfigError(
            f"{type(given).__name__}.add_origin_loss must be True or False, got "
            f"{given.add_origin_loss!r}."
        )
    return keeps_task_loss
