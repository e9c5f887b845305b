"""Options of the distillation plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from compression_manager.checks import (
    require_choice,
    require_not_negative,
    require_positive,
    require_type,
)
from compression_manager.errors import ConfigError
from compression_manager.plugin import PluginConfig, option

TASK_LOSS_TYPES = ("CE", "KL", "MSE")


@dataclass(frozen=True)
class KnowledgeDistillationLossConfig:
    """Soft targets: `w0 * task_loss + w1 * T^2 * D(student / T, teacher / T)`.

    The names and the order of the pairs are Neural Compressor's. Unlike there, D is a mean over
    the batch and not over the elements.
    """

    temperature: float = field(
        default=1.0, metadata=option("T: divides both logits; 1 leaves them as they are.")
    )
    loss_types: tuple[str, str] = field(
        default=("CE", "CE"),
        metadata=option(
            "The task's own loss (computed by the loop; only named here), and D: 'CE' is soft "
            "cross-entropy, 'KL' divergence, 'MSE' on logits, or a loss that a plugin offers."
        ),
    )
    loss_weights: tuple[float, float] = field(
        default=(0.5, 0.5), metadata=option("w0 and w1: weights of the task's loss and of D.")
    )
    loss_options: Mapping[str, Any] = field(
        default_factory=dict, metadata=option("Further options of a loss that a plugin offers.")
    )

    def __post_init__(self) -> None:
        owner = type(self).__name__
        require_positive(owner, "temperature", self.temperature)
        for name in ("loss_types", "loss_weights"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise ConfigError(f"{owner}.{name} must be a list of two entries, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        require_choice(owner, "loss_types[0]", self.loss_types[0], TASK_LOSS_TYPES)
        require_type(owner, "loss_types[1]", self.loss_types[1], str)
        for index, weight in enumerate(self.loss_weights):
            require_not_negative(owner, f"loss_weights[{index}]", weight)
        require_type(owner, "loss_options", self.loss_options, Mapping)
        object.__setattr__(self, "loss_options", dict(self.loss_options))
        if "temperature" in self.loss_options:
            raise ConfigError(f"{owner}.loss_options holds 'temperature'; use {owner}.temperature.")


CRITERIA: dict[str, type[Any]] = {"knowledge_distillation": KnowledgeDistillationLossConfig}


@dataclass(frozen=True)
class DistillationConfig(PluginConfig):
    """Learn from a teacher's outputs beside the task's own loss."""

    plugin: ClassVar[str] = "distillation"

    teacher_model: nn.Module | None = field(
        default=None,
        metadata=option(
            "The trained teacher; frozen, in eval mode, and kept out of the student.", runtime=True
        ),
    )
    criterion: KnowledgeDistillationLossConfig = field(
        default_factory=KnowledgeDistillationLossConfig,
        metadata={**option("How the outputs are compared."), "registry": CRITERIA},
    )
    teacher_outputs: Literal["model", "caller"] = field(
        default="model",
        metadata=option(
            "'model' runs teacher_model, whatever the loop passes; 'caller' takes teacher_output "
            "from on_after_compute_loss."
        ),
    )
    output: str | int | None = field(
        default=None,
        metadata=option("Key or index of the logits in the student's output; default: found."),
    )
    teacher_output: str | int | None = field(
        default=None,
        metadata=option("Key or index of the logits in the teacher's output; default: found."),
    )
    teacher_forward: Callable[[nn.Module, Any], Any] | None = field(
        default=None,
        metadata=option(
            "Calls the teacher: teacher_forward(teacher, inputs); default: as the student.",
            runtime=True,
        ),
    )

    def __post_init__(self) -> None:
        owner = type(self).__name__
        require_choice(owner, "teacher_outputs", self.teacher_outputs, ("model", "caller"))
        require_type(owner, "teacher_model", self.teacher_model, (nn.Module, type(None)))
        require_type(owner, "criterion", self.criterion, tuple(CRITERIA.values()))
        for name in ("output", "teacher_output"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
                raise ConfigError(f"{owner}.{name} must be a key, an index or None, got {value!r}.")
        if self.teacher_forward is not None and not callable(self.teacher_forward):
            raise ConfigError(
                f"{owner}.teacher_forward must be a function of the teacher and the inputs, "
                f"got {self.teacher_forward!r}."
            )
        if self.teacher_model is None and self.teacher_outputs == "model":
            raise ConfigError(
                f"{owner}.teacher_model is missing. Pass the teacher (with a recipe: "
                "prepare_compression(..., teacher_model=teacher)), or set "
                "teacher_outputs='caller' and give its outputs to on_after_compute_loss."
            )
        if self.teacher_model is not None and self.teacher_outputs == "caller":
            raise ConfigError(
                f"{owner}.teacher_model has no use with teacher_outputs='caller'; drop one."
            )
        if self.teacher_forward is not None and self.teacher_outputs == "caller":
            raise ConfigError(
                f"{owner}.teacher_forward has no use with teacher_outputs='caller'; drop one."
            )
