"""The strategies that the distillation study compares, each with its grid of settings.

A weight is a factor of the distillation term; the task's own loss has the factor `task`, 1 where
that is not named. Layers are those of examples/models.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from compression_manager.plugin import PluginConfig
from compression_plugins import (
    AdaptiveSchedule,
    CosineSchedule,
    CurriculumSchedule,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    LinearSchedule,
    SelfKnowledgeDistillationLossConfig,
)

Setting = dict[str, float]
# What the student learns from: the teacher's recorded answers (logits of the teacher itself, of its
# int8 or bfloat16 form, of an ensemble), answers that the loop gets from the live teacher, itself,
# or nobody.
Source = Literal["recorded", "int8", "bfloat16", "ensemble", "caller", "itself", "nobody"]
# (teacher, optimizer steps of the training, setting) -> plugins
Build = Callable[[nn.Module | None, int, Setting], list[PluginConfig]]


@dataclass(frozen=True)
class Strategy:
    """A way to distill.

    Attributes:
        name: in files and in the summary.
        title: for people.
        build: makes the plugins of a setting.
        grid: the settings among which validation images choose.
        like: instead of a grid, the strategy whose chosen setting is taken.
        source: whom the student learns from.
        layers: of the teacher, which are compared.
    """

    name: str
    title: str
    build: Build
    grid: tuple[Setting, ...] = ()
    like: str = ""
    source: Source = "recorded"
    layers: tuple[str, ...] = ()


def _nothing(teacher: nn.Module | None, steps: int, setting: Setting) -> list[PluginConfig]:
    return []


def _logits(loss: str, *options: str, **config: Any) -> Build:
    """Compare logits; the settings named in `options` are options of the loss."""

    def build(teacher: nn.Module | None, steps: int, setting: Setting) -> list[PluginConfig]:
        criterion = KnowledgeDistillationLossConfig(
            temperature=setting["temperature"],
            loss_types=("CE", loss),
            loss_weights=(setting["task"], setting["weight"]),
            loss_options={name: setting[name] for name in options},
        )
        return [DistillationConfig(teacher, criterion=criterion, **config)]

    return build


def _adaptive(teacher: nn.Module | None, steps: int, setting: Setting) -> list[PluginConfig]:
    criterion = KnowledgeDistillationLossConfig(
        temperature=AdaptiveSchedule(setting["unsure"], setting["sure"]),
        loss_types=("CE", "KL"),
        loss_weights=(setting["task"], setting["weight"]),
    )
    return [DistillationConfig(teacher, criterion=criterion)]


def _falling_temperature(schedule: type[LinearSchedule] | type[CosineSchedule]) -> Build:
    def build(teacher: nn.Module | None, steps: int, setting: Setting) -> list[PluginConfig]:
        criterion = KnowledgeDistillationLossConfig(
            temperature=schedule(setting["start"], setting["end"], steps),
            loss_types=("CE", "KL"),
            loss_weights=(setting["task"], setting["weight"]),
        )
        return [DistillationConfig(teacher, criterion=criterion)]

    return build


def _curriculum(teacher: nn.Module | None, steps: int, setting: Setting) -> list[PluginConfig]:
    thirds = (max(1, steps // 3), max(2, 2 * steps // 3))
    weights = (setting["first"], setting["second"], setting["third"])
    criterion = KnowledgeDistillationLossConfig(
        temperature=setting["temperature"],
        loss_types=("CE", "KL"),
        loss_weights=(setting["task"], CurriculumSchedule(weights, thirds)),
    )
    return [DistillationConfig(teacher, criterion=criterion)]


def _layers(loss: str, *layers: str, **config: Any) -> Build:
    """Compare layers of the same name, each with the setting's weight."""

    def build(teacher: nn.Module | None, steps: int, setting: Setting) -> list[PluginConfig]:
        criterion = IntermediateLayersKnowledgeDistillationLossConfig(
            layers, loss_types=loss, loss_weights=setting["weight"], **config
        )
        return [DistillationConfig(teacher, criterion=criterion)]

    return build


def _soft_targets_and_hint(
    teacher: nn.Module | None, steps: int, setting: Setting
) -> list[PluginConfig]:
    soft = KnowledgeDistillationLossConfig(
        setting["temperature"],
        loss_types=("CE", "KL"),
        loss_weights=(setting["task"], setting["weight"]),
    )
    hint = IntermediateLayersKnowledgeDistillationLossConfig(
        BLOCKS, loss_weights=setting["hint_weight"]
    )
    return [DistillationConfig(teacher, criterion=item) for item in (soft, hint)]


def _itself(teacher: nn.Module | None, steps: int, setting: Setting) -> list[PluginConfig]:
    criterion = SelfKnowledgeDistillationLossConfig(
        [[["block1", "block3"], ["block2", "block3"]]],
        loss_types="similarity_preserving",
        loss_weights=setting["weight"],
    )
    return [DistillationConfig(criterion=criterion)]


def _moving_average(teacher: nn.Module | None, steps: int, setting: Setting) -> list[PluginConfig]:
    build = _logits("KL", teacher_outputs="ema", ema_decay=setting["decay"])
    return build(None, steps, setting)


def _grid(*settings: tuple[float, ...], names: str) -> tuple[Setting, ...]:
    return tuple(dict(zip(names.split(), values, strict=True)) for values in settings)


def _soft(*settings: tuple[float, ...]) -> tuple[Setting, ...]:
    return _grid(*settings, names="temperature task weight")


def _weights(*weights: float) -> tuple[Setting, ...]:
    return tuple({"weight": weight} for weight in weights)


CONTROL = "control"
BLOCKS = ("block2", "block3")
FEATURES = "flatten"  # what the classifier sees
SOFT_TARGETS = _soft((4, 0.1, 0.9), (2, 0.1, 0.9), (4, 0.5, 0.5))

STRATEGIES = (
    Strategy(CONTROL, "no distillation (control)", _nothing, ({},), source="nobody"),
    Strategy("KL", "KL divergence", _logits("KL"), SOFT_TARGETS),
    Strategy("CE", "soft cross-entropy", _logits("CE"), SOFT_TARGETS),
    Strategy(
        "MSE_logits",
        "squared error of logits",
        _logits("MSE"),
        _soft((1, 0.1, 0.9), (1, 0.5, 0.5)),
    ),
    Strategy(
        "DKD",
        "decoupled",
        _logits("DKD", "alpha", "beta"),
        _grid(
            (4, 1, 1, 1, 8),
            (4, 1, 1, 1, 2),
            (2, 1, 1, 1, 4),
            names="temperature task weight alpha beta",
        ),
    ),
    Strategy(
        "DIST",
        "correlations (DIST)",
        _logits("DIST"),
        _soft((1, 1, 2), (4, 1, 0.5), (4, 1, 2)),
    ),
    Strategy(
        "reverse_KL",
        "reverse KL divergence",
        _logits("reverse_KL"),
        _soft((4, 0.1, 0.9), (2, 0.1, 0.9)),
    ),
    Strategy(
        "JS",
        "Jensen-Shannon divergence",
        _logits("JS"),
        _soft((4, 0.1, 0.9), (4, 0.1, 3.6)),
    ),
    Strategy(
        "KL_label_smoothing",
        "KL, smoothed targets",
        _logits("KL", "label_smoothing"),
        _grid(
            (4, 0.1, 0.9, 0.05), (4, 0.1, 0.9, 0.1), names="temperature task weight label_smoothing"
        ),
    ),
    Strategy(
        "KL_adaptive_temperature",
        "KL, temperature by confidence",
        _adaptive,
        _grid((2, 6, 0.1, 0.9), (6, 2, 0.1, 0.9), names="unsure sure task weight"),
    ),
    Strategy(
        "KL_cosine_temperature",
        "KL, temperature along a cosine",
        _falling_temperature(CosineSchedule),
        _grid((8, 2, 0.1, 0.9), (6, 1, 0.1, 0.9), names="start end task weight"),
    ),
    Strategy(
        "KL_linear_temperature",
        "KL, temperature along a line",
        _falling_temperature(LinearSchedule),
        _grid((8, 2, 0.1, 0.9), (6, 1, 0.1, 0.9), names="start end task weight"),
    ),
    Strategy(
        "KL_curriculum_weight",
        "KL, weight in three stages",
        _curriculum,
        _grid(
            (4, 0.1, 0.9, 0.6, 0.3),
            (4, 0.1, 0.3, 0.6, 0.9),
            names="temperature task first second third",
        ),
    ),
    Strategy(
        "MSE_hint",
        "hint: squared error, 2 blocks",
        _layers("MSE", *BLOCKS),
        _weights(0.5, 5),
        layers=BLOCKS,
    ),
    Strategy(
        "L1_hint",
        "hint: absolute error, 2 blocks",
        _layers("L1", *BLOCKS),
        _weights(0.5, 5),
        layers=BLOCKS,
    ),
    Strategy(
        "attention_transfer",
        "attention transfer, 2 blocks",
        _layers("attention_transfer", *BLOCKS),
        _weights(50, 500),
        layers=BLOCKS,
    ),
    Strategy(
        "similarity_preserving",
        "similarity-preserving, block 3",
        _layers("similarity_preserving", "block3"),
        _weights(300, 3000),
        layers=("block3",),
    ),
    Strategy(
        "rkd_distance",
        "relational, distances",
        _layers("rkd_distance", FEATURES),
        _weights(25, 100),
        layers=(FEATURES,),
    ),
    Strategy(
        "rkd_angle",
        "relational, angles",
        _layers("rkd_angle", FEATURES),
        _weights(10, 50),
        layers=(FEATURES,),
    ),
    Strategy(
        "contrastive",
        "contrastive, logits",
        _logits("contrastive"),
        _soft((0.1, 1, 0.2), (0.1, 1, 1)),
    ),
    Strategy(
        "contrastive_features",
        "contrastive, what the classifier sees",
        _layers("contrastive", FEATURES, temperature=0.1),
        _weights(0.2, 1),
        layers=(FEATURES,),
    ),
    Strategy(
        "KL_and_hint",
        "KL and hint together",
        _soft_targets_and_hint,
        _grid((4, 0.1, 0.9, 0.1), (4, 0.1, 0.9, 1), names="temperature task weight hint_weight"),
        layers=BLOCKS,
    ),
    Strategy(
        "self_distillation",
        "self: blocks 1 and 2 from block 3",
        _itself,
        _weights(30, 300),
        source="itself",
    ),
    Strategy(
        "moving_average",
        "moving average of the student",
        _moving_average,
        _grid((2, 0.5, 0.5, 0.99), (2, 0.5, 0.5, 0.999), names="temperature task weight decay"),
        source="itself",
    ),
    Strategy(
        "ensemble",
        "KL, ensemble of two teachers",
        _logits("KL"),
        SOFT_TARGETS[:2],
        source="ensemble",
    ),
    Strategy(
        "caller_outputs",
        "KL, outputs from the loop (check)",
        _logits("KL", teacher_outputs="caller"),
        like="KL",
        source="caller",
    ),
    Strategy(
        "int8_teacher",
        "KL, int8 teacher (check)",
        _logits("KL"),
        like="KL",
        source="int8",
    ),
    Strategy(
        "bfloat16_teacher",
        "KL, bfloat16 teacher (check)",
        _logits("KL"),
        like="KL",
        source="bfloat16",
    ),
)
# Takes four times as long as the others, so that it has to begin first.
SLOWEST = "rkd_angle"
CHECKS = tuple(strategy.name for strategy in STRATEGIES if strategy.like)
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
