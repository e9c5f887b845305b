"""Intermediate layers: features of the student are compared with features of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from compression_manager.configuration.checks import require_choice
from compression_manager.errors import ConfigError, blame_option
from compression_manager.plugin import option
from compression_plugins.distillation.criteria.base import Surroundings
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.feature_config import (
    FeatureCriterionConfig,
    feature_at,
)
from compression_plugins.distillation.criteria.features import FeatureComparison, FeaturePair
from compression_plugins.distillation.criteria.mappings import (
    LayerMapping,
    expand,
    parse_mappings,
)
from compression_plugins.distillation.criteria.recorder import Recorder


@dataclass(frozen=True)
class IntermediateLayersKnowledgeDistillationLossConfig(FeatureCriterionConfig):
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
    projection: Literal["auto", "none"] = field(
        default="auto",
        metadata=option("'auto' bridges features of different shape; 'none' refuses them."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_entries(len(self.mappings))
        require_choice(self, "projection", self.projection, ("auto", "none"))

    @property
    def mappings(self) -> tuple[LayerMapping, ...]:
        """`layer_mappings`, read."""
        return parse_mappings(self, "layer_mappings", self.layer_mappings)

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
            class_dimension=self.class_dimension,
            projects=self.projection == "auto",
        )

    def _pairs(self, surroundings: Surroundings, teacher: nn.Module) -> list[FeaturePair]:
        expanded = []
        for index, mapping in enumerate(self.mappings):
            with blame_option(f"criterion.layer_mappings[{index}]"):
                expanded.append(expand(mapping, surroundings.student, teacher))
        return self.make_pairs(surroundings, expanded)
