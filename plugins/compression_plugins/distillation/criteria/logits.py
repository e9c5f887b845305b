"""Soft targets: the two models' logits are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from compression_manager.configuration.checks import (
    require_choice,
    require_not_negative,
    require_type,
)
from compression_manager.errors import ConfigError, blame_option
from compression_manager.loss import LossTerms
from compression_manager.plugin import option
from compression_plugins.distillation.classes import has_known_classes, require_classes
from compression_plugins.distillation.criteria.base import (
    Comparison,
    CriterionConfig,
    Surroundings,
)
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.catalog import CATALOG, NamedLoss
from compression_plugins.distillation.criteria.schedules import (
    SCHEDULES,
    Schedule,
    require_temperature,
    require_weight,
    value_at,
    weight_at,
)

TASK_LOSS_TYPES = ("CE", "KL", "MSE")
# Logits (N, classes) have no places beside the channels.
_OF_LOGITS = [name for name, entry in CATALOG.items() if entry.agreement != "positions"]


@dataclass(frozen=True)
class KnowledgeDistillationLossConfig(CriterionConfig):
    """Soft targets: `w0 * task_loss + w1 * T^2 * D(student / T, teacher / T)`.

    The names and the order of the pairs are Neural Compressor's. Unlike there, D is a mean over
    the batch and not over the elements.
    """

    task_weight_option: ClassVar[str] = "loss_weights[0]"

    temperature: float | Schedule = field(
        default=1.0,
        metadata={
            **option("T: divides both logits; 1 leaves them as they are. Or a schedule."),
            "registry": SCHEDULES,
        },
    )
    loss_types: tuple[str, str] = field(
        default=("CE", "CE"),
        metadata=option(
            "The task's own loss (computed by the loop; only named here), and D: 'CE' is soft "
            "cross-entropy, 'KL' divergence, 'MSE' on logits, 'DKD', 'DIST', 'reverse_KL', 'JS', "
            "or a loss that a plugin offers."
        ),
    )
    loss_weights: tuple[float, float | Schedule] = field(
        default=(0.5, 0.5),
        metadata={
            **option("w0 and w1: weights of the task's loss and of D; w1 may be a schedule."),
            "registry": SCHEDULES,
        },
    )
    loss_options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=option("Further options of D, for example {alpha: 1, beta: 8} of 'DKD'."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        require_temperature(owner, "temperature", self.temperature)
        require_two(self, "loss_types")
        require_choice(owner, "loss_types[0]", self.loss_types[0], TASK_LOSS_TYPES)
        require_type(owner, "loss_types[1]", self.loss_types[1], str)
        check_loss_weights(self, self.loss_weights)
        check_loss_options(self, self.loss_options)

    @property
    def task_weight(self) -> float:
        """Factor of the task's own loss."""
        return self.loss_weights[0]

    def compare(self, surroundings: Surroundings) -> LogitComparison:
        """Return the comparison of both models' logits."""
        # Only the plugin that offers the loss knows its options.
        chosen_by = "" if self.loss_options else ".loss_types[1]"
        loss = named_loss(
            surroundings,
            self.loss_types[1],
            self.temperature,
            self.loss_options,
            chosen_by,
            known=_OF_LOGITS,
        )
        return LogitComparison(loss, self, surroundings)


class LogitComparison(Comparison):
    """Adds the term `<prefix>/<D>`."""

    def __init__(
        self,
        loss: NamedLoss,
        config: KnowledgeDistillationLossConfig,
        surroundings: Surroundings,
    ) -> None:
        self._loss = loss
        self._temperature = config.temperature
        self._weight = config.loss_weights[1]
        self._class_dimension = config.class_dimension
        self._surroundings = surroundings

    def check(self, batch: Batch) -> None:
        """Refuse logits of different shape, or that the loss cannot be computed of."""
        self._logits(batch)
        if not batch.is_training and self._loss.can_be_tried:
            self._compare(batch)

    def add_terms(self, batch: Batch, losses: LossTerms, prefix: str) -> None:
        """Add the weighted comparison of both logits."""
        losses.add(f"{prefix}/{self._loss.name}", *self._compare(batch))

    def _compare(self, batch: Batch) -> tuple[Tensor, float | Tensor]:
        """Return the value and its weight."""
        student, teacher = self._logits(batch)
        # Which class the teacher is sure of is unknown where it is unknown what the classes are.
        sure = teacher if has_known_classes(teacher, self._class_dimension) else None
        temperature = temperature_of(self._loss, self._temperature, batch, sure)
        value = self._loss(student, teacher, batch, temperature)
        return value, weight_at(self._weight, batch.global_step, sure)

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        student = self._surroundings.student_logits(batch.student_output)
        teacher = self._surroundings.teacher_logits(batch.teacher_output)
        check_same_logits(student, teacher)
        if self._loss.has_softmax:
            with blame_option("criterion.loss_types[1]"):
                require_classes(student, self._class_dimension, self._loss.name)
        return student, teacher


def temperature_of(
    loss: NamedLoss, temperature: float | Schedule, batch: Batch, teacher: Tensor | None
) -> float | Tensor | None:
    """Return the present temperature, or None where the loss is not given any."""
    if not loss.takes_temperature:
        return None
    return value_at(temperature, batch.global_step, teacher)


def named_loss(
    surroundings: Surroundings,
    name: str,
    temperature: float | Schedule,
    options: Mapping[str, Any],
    chosen_by: str,
    *,
    known: Iterable[str] = CATALOG,
) -> NamedLoss:
    """Return the loss `name`, made with the temperature if that is fixed.

    Args:
        surroundings: of the criterion.
        name: of the loss.
        temperature: a number, or what changes it.
        options: the loss's further options.
        chosen_by: the criterion's option that names the loss, with its dot; or nothing.
        known: names that the option could have had, for the error.

    Raises:
        ConfigError: nobody offers it, it lacks an option, or its temperature cannot be scheduled.
    """
    is_scheduled = isinstance(temperature, Schedule)
    fixed = {} if is_scheduled else {"temperature": temperature}
    loss = surroundings.make_loss(name, {**fixed, **options}, f"criterion{chosen_by}", known)
    # Ours that know no temperature leave out a schedule, as they do a number.
    if is_scheduled and not loss.takes_temperature and not loss.is_builtin:
        with blame_option("criterion.temperature"):
            raise ConfigError(
                f"the distillation loss '{name}' takes no temperature at each call, so that it "
                "cannot follow a schedule; give a number."
            )
    return loss


def require_two(owner: object, field: str) -> None:
    """Raise ConfigError unless a criterion's field holds two entries; make it a tuple."""
    value = getattr(owner, field)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        name = type(owner).__name__
        raise ConfigError(f"{name}.{field} must be a list of two entries, got {value!r}.")
    object.__setattr__(owner, field, tuple(value))


def check_loss_weights(owner: object, weights: Sequence[float | Schedule]) -> None:
    """Check the field `loss_weights` of a criterion, those of the task's loss and of its own."""
    require_two(owner, "loss_weights")
    require_not_negative(owner, "loss_weights[0]", weights[0])
    require_weight(owner, "loss_weights[1]", weights[1])


def check_loss_options(owner: object, options: Mapping[str, Any]) -> None:
    """Check the field `loss_options` of a criterion, and give it a copy of its own."""
    require_type(owner, "loss_options", options, Mapping)
    object.__setattr__(owner, "loss_options", dict(options))
    if "temperature" in options:
        name = type(owner).__name__
        raise ConfigError(f"{name}.loss_options holds 'temperature'; use {name}.temperature.")


def check_same_logits(student: Tensor, teacher: Tensor) -> None:
    """Raise ConfigError unless both logits have the same shape."""
    if student.shape != teacher.shape:
        what = "classes" if student.shape[:-1] == teacher.shape[:-1] else "shapes"
        raise ConfigError(
            f"student and teacher logits differ in their {what}: {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; both models must predict the same classes for the same batch."
        )
