"""Intermediate layers: features of the student are compared with features of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from compression_manager.checks import require_choice, require_type
from compression_manager.errors import ConfigError, blame_option
from compression_manager.plugin import option
from compression_plugins.distillation.criteria.base import CriterionConfig, Surroundings
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.features import FeatureComparison, FeaturePair
from compression_plugins.distillation.criteria.logits import check_loss_options, named_loss
from compression_plugins.distillation.criteria.mappings import (
    LayerMapping,
    TapPoint,
    expand,
    parse_mappings,
)
from compression_plugins.distillation.criteria.recorder import Recorder
from compression_plugins.distillation.criteria.schedules import (
    SCHEDULES,
    Schedule,
    require_temperature,
    require_weight,
)
from compression_plugins.distillation.outputs import pick_feature


@dataclass(frozen=True)
class IntermediateLayersKnowledgeDistillationLossConfig(CriterionConfig):
    """Features: `task_loss + sum of w_i * D_i(projected student layer, teacher layer)`.

    Widths and image sizes that differ are bridged by projections, which the tracked optimizer
    trains and the converted model does not contain. The names are Neural Compressor's; there, the
    task's own loss is left out by default and projections are never trained.
    """

    needs_teacher_layers: ClassVar[bool] = True

    layer_mappings: Sequence[Any] = field(
        metadata=option(
            "What is compared: a name for both models ('layer3'), a pair of names ([student, "
            "teacher]), or a pair of points ([[student, output], [teacher, output]]) with the "
            "index, key or function of the layer's output. A * matches within a part of a name; "
            "'' is the whole model."
        )
    )
    loss_types: str | Sequence[str] = field(
        default="MSE",
        metadata=option(
            "Loss of all mappings, or of each: 'MSE', 'L1', 'attention_transfer', "
            "'similarity_preserving', 'rkd_distance', 'rkd_angle', 'contrastive', 'KL', or a loss "
            "that a plugin offers."
        ),
    )
    loss_weights: float | Schedule | Sequence[float | Schedule] | None = field(
        default=None,
        metadata={
            **option("Weight of all mappings, or of each; default: 1 / number of mappings."),
            "registry": SCHEDULES,
        },
    )
    add_origin_loss: bool = field(
        default=True, metadata=option("Whether the task's own loss is part of the sum.")
    )
    temperature: float | Schedule = field(
        default=1.0,
        metadata={
            **option("T of the losses that know one, such as 'contrastive' (about 0.1) and 'KL'."),
            "registry": SCHEDULES,
        },
    )
    loss_options: Mapping[str, Any] = field(
        default_factory=dict, metadata=option("Further options of the losses.")
    )
    projection: Literal["auto", "none"] = field(
        default="auto",
        metadata=option("'auto' bridges features of different shape; 'none' refuses them."),
    )

    def __post_init__(self) -> None:
        mappings = parse_mappings(self, "layer_mappings", self.layer_mappings)
        object.__setattr__(self, "layer_mappings", tuple(self.layer_mappings))
        object.__setattr__(self, "_mappings", mappings)
        check_loss_types(self, len(mappings))
        check_loss_weights(self, len(mappings))
        require_type(self, "add_origin_loss", self.add_origin_loss, bool)
        require_temperature(self, "temperature", self.temperature)
        require_choice(self, "projection", self.projection, ("auto", "none"))
        check_loss_options(self, self.loss_options)

    @property
    def mappings(self) -> tuple[LayerMapping, ...]:
        """`layer_mappings`, read."""
        mappings: tuple[LayerMapping, ...] = self._mappings  # type: ignore[attr-defined]  # set in __post_init__
        return mappings

    @property
    def task_weight(self) -> float | None:
        """0 if the task's own loss is to be left out; other plugins may weight it otherwise."""
        return None if self.add_origin_loss else 0.0

    def compare(self, surroundings: Surroundings) -> FeatureComparison:
        """Return the comparison, with the layers of both models watched."""
        teacher = surroundings.teacher
        if teacher is None:
            raise ConfigError(
                f"{type(self).__name__} watches the teacher's layers and needs teacher_model."
            )
        pairs = self._pairs(surroundings, teacher)
        students = Recorder(
            surroundings.student,
            (pair.mapping.student.layer for pair in pairs),
            surroundings.hooks,
            where="student",
        )
        teachers = Recorder(
            teacher,
            (pair.mapping.teacher.layer for pair in pairs),
            surroundings.hooks,
            where="teacher",
        )

        def of_student(batch: Batch, mapping: LayerMapping) -> Tensor:
            return feature_at(mapping.student, batch.student_output, students, "student")

        def of_teacher(batch: Batch, mapping: LayerMapping) -> Tensor:
            return feature_at(mapping.teacher, batch.teacher_output, teachers, "teacher")

        return FeatureComparison(
            pairs,
            of_student,
            of_teacher,
            (students, teachers),
            temperature=self.temperature,
            projects=self.projection == "auto",
        )

    def _pairs(self, surroundings: Surroundings, teacher: nn.Module) -> list[FeaturePair]:
        count = len(self.mappings)
        types = one_for_each(self.loss_types, count)
        weights = one_for_each(
            1.0 / count if self.loss_weights is None else self.loss_weights, count
        )
        pairs: list[FeaturePair] = []
        for index, mapping in enumerate(self.mappings):
            with blame_option(f"criterion.layer_mappings[{index}]"):
                expanded = expand(mapping, surroundings.student, teacher)
            loss = named_loss(
                surroundings, types[index], self.temperature, self.loss_options, ".loss_types"
            )
            for item in expanded:
                name = unique_name(f"{types[index]}/{item.name}", pairs)
                pairs.append(FeaturePair(item, loss, weights[index], name))
        return pairs


def feature_at(point: TapPoint, model_output: Any, recorder: Recorder, where: str) -> Tensor:
    """Return the feature at `point`: of the model's own output, or of a layer's that was kept."""
    output = recorder.output(point.layer) if point.layer else model_output
    return pick_feature(output, point.output, where=f"{where}'s {point}")


def one_for_each(value: Any, count: int) -> tuple[Any, ...]:
    """Return `value`, or an entry of it, for each of `count` mappings."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return (value,) * count


def unique_name(name: str, pairs: Sequence[FeaturePair]) -> str:
    """Return `name`, numbered if one of `pairs` has it already."""
    taken = {pair.name for pair in pairs}
    number, unique = 2, name
    while unique in taken:
        unique = f"{name}_{number}"
        number += 1
    return unique


def check_loss_types(config: Any, count: int) -> None:
    """Check the field `loss_types`: a name, or one for each of `count` mappings."""
    types = config.loss_types
    if isinstance(types, (list, tuple)):
        object.__setattr__(config, "loss_types", tuple(types))
        _check_count(config, "loss_types", types, count)
        for index, name in enumerate(types):
            require_type(config, f"loss_types[{index}]", name, str)
    else:
        require_type(config, "loss_types", types, str)


def check_loss_weights(config: Any, count: int) -> None:
    """Check the field `loss_weights`: a weight, one for each of `count` mappings, or None."""
    weights = config.loss_weights
    if isinstance(weights, (list, tuple)):
        object.__setattr__(config, "loss_weights", tuple(weights))
        _check_count(config, "loss_weights", weights, count)
        for index, weight in enumerate(weights):
            require_weight(config, f"loss_weights[{index}]", weight)
    elif weights is not None:
        require_weight(config, "loss_weights", weights)


def _check_count(config: Any, field: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ConfigError(
            f"{type(config).__name__}.{field} has {len(values)} entries for {count} "
            "layer_mappings; give one for each, or a single one for all."
        )
