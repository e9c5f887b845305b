"""Options of the distillation plugin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from compression_manager.configuration.checks import (
    require_choice,
    require_fraction,
    require_integer,
    require_type,
)
from compression_manager.errors import ConfigError, MissingObjectError
from compression_manager.plugin import PluginConfig, option
from compression_plugins.distillation.cache import TeacherCache
from compression_plugins.distillation.criteria import (
    CRITERIA,
    CriterionConfig,
    KnowledgeDistillationLossConfig,
)
from compression_plugins.distillation.teachers.runtime import TeacherRuntime

SOURCES = ("model", "caller", "ema")


@dataclass(frozen=True)
class DistillationConfig(PluginConfig):
    """Learn from a teacher's outputs or layers beside the task's own loss."""

    plugin: ClassVar[str] = "distillation"

    teacher_model: nn.Module | None = field(
        default=None,
        metadata=option(
            "The trained teacher; frozen, in eval mode, and kept out of the student.", runtime=True
        ),
    )
    criterion: CriterionConfig = field(
        default_factory=KnowledgeDistillationLossConfig,
        metadata={**option("What is compared, and how."), "registry": CRITERIA},
    )
    teacher_outputs: Literal["model", "caller", "ema"] = field(
        default="model",
        metadata=option(
            "'model' runs teacher_model, whatever the loop passes; 'caller' takes teacher_output "
            "from on_after_compute_loss; 'ema' runs a moving average of the student's own weights."
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
    teacher_cache: TeacherCache | None = field(
        default=None,
        metadata=option(
            "The teacher's stored outputs, read by the sample_ids that the loop passes instead of "
            "running teacher_model, which then is only compared with the cache if it is given.",
            runtime=True,
        ),
    )
    augmentation_seeds: Sequence[int] = field(
        default=(0,),
        metadata=option(
            "With teacher_cache: the augmentation seed of the first epoch, the second, and so on, "
            "from the beginning again after the last."
        ),
    )
    teacher_runtime: TeacherRuntime = field(
        default_factory=TeacherRuntime,
        metadata=option("How teacher_model runs: its precision, compiled, memory format."),
    )
    synchronize: bool = field(
        default=True,
        metadata=option(
            "Whether all ranks of torch.distributed train the same projections; false for ranks "
            "that train models of their own."
        ),
    )
    ema_decay: float = field(
        default=0.999,
        metadata=option("Of 'ema': share of the average that stays at each optimizer step."),
    )

    def __post_init__(self) -> None:
        require_choice(self, "teacher_outputs", self.teacher_outputs, SOURCES)
        require_type(self, "teacher_model", self.teacher_model, (nn.Module, type(None)))
        if not isinstance(self.criterion, CriterionConfig):
            require_type(self, "criterion", self.criterion, tuple(CRITERIA.values()))
        for name in ("output", "teacher_output"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
                raise ConfigError(
                    f"{type(self).__name__}.{name} must be a key, an index or None, got {value!r}."
                )
        if self.teacher_forward is not None and not callable(self.teacher_forward):
            raise ConfigError(
                f"{type(self).__name__}.teacher_forward must be a function of the teacher and the "
                f"inputs, got {self.teacher_forward!r}."
            )
        require_type(self, "teacher_cache", self.teacher_cache, (TeacherCache, type(None)))
        self._check_seeds()
        require_type(self, "teacher_runtime", self.teacher_runtime, TeacherRuntime)
        require_type(self, "synchronize", self.synchronize, bool)
        require_fraction(self, "ema_decay", self.ema_decay)
        self._check_source()

    def _check_seeds(self) -> None:
        seeds = self.augmentation_seeds
        if not isinstance(seeds, (list, tuple)) or not seeds:
            raise ConfigError(
                f"{type(self).__name__}.augmentation_seeds must be a list of at least one whole "
                f"number, got {seeds!r}."
            )
        for index, seed in enumerate(seeds):
            require_integer(self, f"augmentation_seeds[{index}]", seed)
        object.__setattr__(self, "augmentation_seeds", tuple(seeds))

    def _check_source(self) -> None:
        owner, source = type(self).__name__, self.teacher_outputs
        criterion = type(self.criterion).__name__
        if not self.criterion.needs_teacher:
            for name in ("teacher_model", "teacher_forward", "teacher_cache"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{owner}.{name} has no use with {criterion}, in which the student is its "
                        "own teacher; drop one."
                    )
            return
        if self.teacher_cache is not None:
            self._check_cache()
            return
        if self.teacher_model is None and source == "model":
            raise MissingObjectError(
                f"{owner}.teacher_model is missing. Pass the teacher (with a recipe: "
                "prepare_compression(..., teacher_model=teacher)), or set "
                "teacher_outputs='caller' and give its outputs to on_after_compute_loss, or pass a "
                "teacher_cache.",
                option="teacher_model",
            )
        if self.teacher_model is not None and source != "model":
            raise ConfigError(
                f"{owner}.teacher_model has no use with teacher_outputs='{source}'; drop one."
            )
        if self.teacher_model is None and self.teacher_runtime != TeacherRuntime():
            raise ConfigError(
                f"{owner}.teacher_runtime has no use without teacher_model; drop one."
            )
        if source == "caller":
            if self.teacher_forward is not None:
                raise ConfigError(
                    f"{owner}.teacher_forward has no use with teacher_outputs='caller'; drop one."
                )
            if self.criterion.needs_teacher_layers:
                raise ConfigError(
                    f"{criterion} watches the teacher's layers, which the loop cannot pass; set "
                    "teacher_model instead of teacher_outputs='caller'."
                )

    def _check_cache(self) -> None:
        owner = type(self).__name__
        if self.criterion.needs_teacher_layers:
            raise ConfigError(
                f"{type(self.criterion).__name__} watches the teacher's layers, which a cache does "
                "not hold; leave teacher_cache out."
            )
        unused = {
            "teacher_outputs": self.teacher_outputs != "model",
            "teacher_forward": self.teacher_forward is not None,
            "teacher_output": self.teacher_output is not None,
            "teacher_runtime": self.teacher_runtime != TeacherRuntime(),
        }
        for name, is_set in unused.items():
            if is_set:
                raise ConfigError(
                    f"{owner}.{name} has no use with teacher_cache, from which no teacher is run; "
                    "drop one. What ran the teacher was given to TeacherCache.build."
                )
