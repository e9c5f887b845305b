"""Comparing pairs of features: of two models, or of two depths of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.errors import CheckpointMismatchError, ConfigError, blame_option
from compression_manager.loss import LossTerms
from compression_plugins.distillation.classes import classes_last, require_classes
from compression_plugins.distillation.criteria.base import Comparison
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.catalog import NamedLoss
from compression_plugins.distillation.criteria.logits import temperature_of
from compression_plugins.distillation.criteria.mappings import LayerMapping
from compression_plugins.distillation.criteria.projections import (
    Projection,
    identity_projection,
    make_projection,
)
from compression_plugins.distillation.criteria.recorder import Recorder
from compression_plugins.distillation.criteria.schedules import Schedule, weight_at


@dataclass
class FeaturePair:
    """One comparison.

    Attributes:
        mapping: what is compared, without globs.
        loss: how.
        weight: factor of the term.
        name: of the term and of the projection's parameters.
        option: of the config, for errors.
        projection: brings the student's feature to the teacher's shape; None where nothing must
            be, and before the first features were seen.
    """

    mapping: LayerMapping
    loss: NamedLoss
    weight: float | Schedule
    name: str
    option: str = "criterion.layer_mappings"
    projection: Projection | None = None


FeatureOf = Callable[[Batch, LayerMapping], Tensor]


class FeatureComparison(Comparison):
    """Adds a term `<prefix>/<loss>/<layer of the student>` for each pair.

    Args:
        pairs: what is compared.
        student: the feature of the student, by batch and mapping.
        teacher: the feature to learn from.
        recorders: what keeps the outputs of layers.
        temperature: of the losses that know one.
        projects: whether features of different shape get a projection, or are refused.
        class_dimension: what losses with a softmax compare distributions over; of features of at
            most 3 dimensions, None is the last.
    """

    def __init__(
        self,
        pairs: Sequence[FeaturePair],
        student: FeatureOf,
        teacher: FeatureOf,
        recorders: Iterable[Recorder],
        *,
        temperature: float | Schedule = 1.0,
        projects: bool = True,
        class_dimension: int | None = None,
    ) -> None:
        self._pairs = pairs
        self._student = student
        self._teacher = teacher
        self.recorders = tuple(recorders)
        self._temperature = temperature
        self._projects = projects
        self._class_dimension = class_dimension

    def check(self, batch: Batch) -> None:
        """Refuse dead layers and features that cannot be compared; create the projections."""
        for pair in self._pairs:
            with blame_option(pair.option):
                self._check(pair, batch)

    def add_terms(self, batch: Batch, losses: LossTerms, prefix: str) -> None:
        """Add the weighted comparison of each pair."""
        for pair in self._pairs:
            with blame_option(pair.option):
                value, weight = self._compare(pair, batch)
            losses.add(f"{prefix}/{pair.name}", value, weight)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the projections' parameters by name."""
        return {
            f"{pair.name}/{name}": parameter
            for pair in self._pairs
            if pair.projection is not None
            for name, parameter in pair.projection.named_parameters()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the shapes that each projection was made for, its weights and gradients."""
        return {
            pair.name: pair.projection.describe()
            for pair in self._pairs
            if pair.projection is not None
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the projections; those that do not exist yet are created.

        Raises:
            CheckpointMismatchError: a projection belongs to no pair, or has another shape.
        """
        names = {pair.name for pair in self._pairs}
        for name in state:
            if name not in names:
                raise CheckpointMismatchError(
                    f"the checkpoint holds a projection for '{name}', which is not compared now; "
                    f"compared are {', '.join(sorted(names))}."
                )
        for pair in self._pairs:
            described = state.get(pair.name)
            if described is None:
                pair.projection = None
            else:
                base = pair.projection or identity_projection()
                pair.projection = base.restore(described, pair.name)

    def _check(self, pair: FeaturePair, batch: Batch) -> None:
        student, teacher = self._features(pair, batch)
        if batch.is_training and not student.requires_grad:
            raise ConfigError(
                f"no gradient reaches the student through {pair.mapping.student}: the layer is "
                "frozen, detached or inside of a checkpoint with use_reentrant=True, so that "
                "distilling it trains nothing. Map another layer."
            )
        if pair.projection is None:
            pair.projection = self._projection(pair, student, teacher)
        if not batch.is_training and pair.loss.can_be_tried:
            self._compare(pair, batch)

    def _compare(self, pair: FeaturePair, batch: Batch) -> tuple[Tensor, float | Tensor]:
        """Return the value and its weight."""
        student, teacher = self._features(pair, batch)
        if pair.projection is not None:
            wide = torch.promote_types(student.dtype, torch.float32)
            pair.projection.to(student.device, wide)
            student = pair.projection(student)
        if pair.loss.has_softmax:
            # After the projection, which takes images as (N, channels, height, width).
            student = classes_last(student, self._class_dimension)
            teacher = classes_last(teacher, self._class_dimension)
            require_classes(student, self._class_dimension, pair.loss.name)
        temperature = temperature_of(pair.loss, self._temperature, batch, teacher)
        value = pair.loss(student, teacher, batch, temperature)
        # Images have no classes in their last dimension.
        has_classes = pair.loss.has_softmax or (
            pair.loss.agreement == "everything" and teacher.dim() < 4
        )
        weight = weight_at(pair.weight, batch.global_step, teacher if has_classes else None)
        return value, weight

    def _features(self, pair: FeaturePair, batch: Batch) -> tuple[Tensor, Tensor]:
        mapping = pair.mapping
        student, teacher = self._student(batch, mapping), self._teacher(batch, mapping).detach()
        if student.dim() < 2 or teacher.dim() < 2 or len(student) != len(teacher):
            raise ConfigError(
                f"{mapping.student} of the student gives shape {tuple(student.shape)} and "
                f"{mapping.teacher} of the teacher {tuple(teacher.shape)}; both must begin with "
                "the same batch and have at least two dimensions."
            )
        return student, teacher

    def _projection(self, pair: FeaturePair, student: Tensor, teacher: Tensor) -> Projection | None:
        if pair.loss.agreement == "samples":
            return None
        try:
            projection = make_projection(
                student.shape,
                teacher.shape,
                width_too=pair.loss.agreement == "everything",
                device=student.device,
            )
        except ConfigError as error:
            raise ConfigError(f"{pair.mapping}: {error}") from error
        if projection is not None and not self._projects:
            raise ConfigError(
                f"{pair.mapping} have shapes {tuple(student.shape)} and {tuple(teacher.shape)}, "
                "and projection='none' lets nothing change them; set projection='auto'."
            )
        return projection
