"""Where the teacher's outputs come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.context import Context
from compression_manager.errors import CheckpointMismatchError, ConfigError, blame_option
from compression_manager.models.copying import copy_model
from compression_plugins.distillation.cache import TeacherCache
from compression_plugins.distillation.classes import dimension_of_classes
from compression_plugins.distillation.config import DistillationConfig
from compression_plugins.distillation.teachers.runtime import (
    RunningTeacher,
    running_teacher,
    slower_than_float32,
)
from compression_plugins.distillation.teachers.teacher import (
    Teacher,
    check_distinct,
    main_device,
    weights_hash,
)


class TeacherSource(ABC):
    """Answers what the teacher says to a batch.

    Attributes:
        model: the module that is run here, whose layers can be watched; None if none is.
    """

    model: nn.Module | None = None

    def prepare(self, context: Context, owner: str) -> None:  # noqa: B027 (most change nothing)
        """Change what has to be changed of the teacher until the manager closes."""

    @abstractmethod
    def outputs(
        self, context: Context, input: Any, teacher_output: Any = None, sample_ids: Any = None
    ) -> Any:
        """Return the teacher's output for a batch.

        Args:
            context: of the manager.
            input: what the student was called with.
            teacher_output: what the loop passed.
            sample_ids: what the loop passed.
        """

    def example_outputs(
        self, context: Context, input: Any, student_logits: Callable[[], Tensor]
    ) -> Any:
        """Return outputs for example inputs, or what has their form.

        Args:
            context: of the manager.
            input: the example inputs.
            student_logits: returns the student's logits for them, as the model orders them.
        """
        return self.outputs(context, input)

    def remark(self) -> str:
        """Return what a user should know about it, or nothing."""
        return ""

    def follow(self, student: nn.Module) -> None:  # noqa: B027 (most stay as they are)
        """The student was updated."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart; never a teacher's weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointMismatchError: it belongs to another source.
        """
        if state:
            raise CheckpointMismatchError(
                "the checkpoint was trained with another teacher or a moving average of the "
                f"student, and here is neither; it holds {', '.join(sorted(state))}."
            )


class LiveTeacher(TeacherSource):
    """Runs a model; several plugin instances with the same one run it once per loss."""

    def __init__(self, config: DistillationConfig, model: nn.Module) -> None:
        self._runtime = config.teacher_runtime
        running = running_teacher(model, self._runtime)
        self.model: nn.Module = running.model if isinstance(running, RunningTeacher) else running
        self._original = model
        self._teacher = Teacher(running, config.teacher_forward)
        self._hash: str | None = None
        # A copy whose layers are watched has to run itself.
        is_own = running is not model and config.criterion.needs_teacher_layers
        watched = self.model if is_own else model
        self._key = ("teacher", id(watched), id(config.teacher_forward), config.teacher_runtime)

    def prepare(self, context: Context, owner: str) -> None:
        """Freeze the teacher."""
        self._teacher.freeze(context, owner)

    def remark(self) -> str:
        """Return where the runtime costs time instead of saving it."""
        return slower_than_float32(self._original, self._runtime)

    def outputs(
        self, context: Context, input: Any, teacher_output: Any = None, sample_ids: Any = None
    ) -> Any:
        """Return what the model says, whatever the loop passed."""
        if self._key not in context.step_cache:
            context.step_cache[self._key] = self._teacher.run(input)
        return context.step_cache[self._key]

    def state_dict(self) -> dict[str, Any]:
        """Return the hash of the teacher's weights."""
        if self._hash is None:
            self._hash = weights_hash(self._original)
        return {"teacher_sha256": self._hash}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the teacher is the one that the checkpoint was trained with.

        Raises:
            CheckpointMismatchError: it is another one.
        """
        check_same_teacher(state, self.state_dict())


class CallerTeacher(TeacherSource):
    """Takes what the loop passes."""

    def __init__(self, *, is_optional: bool) -> None:
        self._is_optional = is_optional
        self._owner = ""

    def prepare(self, context: Context, owner: str) -> None:
        """Keep the name of the plugin, for messages."""
        self._owner = owner

    def outputs(
        self, context: Context, input: Any, teacher_output: Any = None, sample_ids: Any = None
    ) -> Any:
        """Return what the loop passed.

        Raises:
            ConfigError: it passed nothing, and the criterion needs it.
        """
        if teacher_output is None and not self._is_optional:
            raise ConfigError(
                f"plugin '{self._owner}' has teacher_outputs='caller', but on_after_compute_loss "
                "got no teacher_output; pass it as the fourth argument."
            )
        return teacher_output


class AveragedStudent(LiveTeacher):
    """An exponential moving average of the student's weights: the mean teacher.

    average = d * average + (1 - d) * weights after every optimizer step, with
    d = min(decay, n / (n + 1)) at update n = 0, 1, ..., so that the first ones are a plain mean
    (Tarvainen, Valpola 2017, "Mean teachers are better role models", section 2 and their code,
    which counts from 1 and so has the initial weights in that mean). Buffers, such as BatchNorm's
    statistics, are copied. It is a float model, whatever the student becomes.
    """

    def __init__(self, config: DistillationConfig, student: nn.Module) -> None:
        super().__init__(config, copy_model(student, keep_user_hooks=False))
        self._decay = config.ema_decay
        self._updates = 0

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Average the student's weights in."""
        decay = min(self._decay, self._updates / (self._updates + 1))
        self._updates += 1
        own, theirs = dict(self.model.named_parameters()), dict(student.named_parameters())
        for name, average in own.items():
            average.lerp_(theirs[name].to(average.device, average.dtype), 1.0 - decay)
        own_buffers, buffers = dict(self.model.named_buffers()), dict(student.named_buffers())
        for name in own_buffers.keys() & buffers.keys():
            own_buffers[name].copy_(buffers[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of its updates: it cannot be had elsewhere."""
        return {"updates": self._updates, "average": dict(self.model.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the average.

        Raises:
            CheckpointMismatchError: the checkpoint holds none.
        """
        if set(state) != {"updates", "average"}:
            raise CheckpointMismatchError(
                "the checkpoint holds no moving average of the student; it was written with "
                "another choice of teacher_outputs."
            )
        self.model.load_state_dict(dict(state["average"]))
        self._updates = state["updates"]


class CachedTeacher(TeacherSource):
    """Reads what a teacher said once and for all."""

    def __init__(self, config: DistillationConfig, cache: TeacherCache) -> None:
        self._cache = cache
        self._seeds = tuple(config.augmentation_seeds)
        self._class_dimension = config.criterion.class_dimension
        self._teacher = config.teacher_model
        self._owner = ""

    def prepare(self, context: Context, owner: str) -> None:
        """Verify every file that will be read, and that the teacher is the one of the cache.

        Raises:
            CheckpointError: a seed was not built, a file is damaged, or belongs to another teacher.
        """
        self._owner = owner
        with blame_option("teacher_cache"):
            if self._teacher is not None:
                self._cache.check(self._teacher)
            for seed in dict.fromkeys(self._seeds):
                self._cache.verify(seed)

    def outputs(
        self, context: Context, input: Any, teacher_output: Any = None, sample_ids: Any = None
    ) -> Any:
        """Return the cached logits of the samples.

        Raises:
            ConfigError: the loop passed no sample ids, or one is not cached.
        """
        if sample_ids is None:
            raise ConfigError(
                f"plugin '{self._owner}' reads the teacher's outputs from a cache and needs "
                "sample_ids; pass them: manager.on_after_compute_loss(inputs, output, loss, "
                "sample_ids=ids). IndexedDataset adds them to your data set's items."
            )
        seed = self._seeds[context.epoch % len(self._seeds)]
        device = main_device(input)
        return self._cache.lookup(sample_ids, augmentation_seed=seed, device=device)

    def example_outputs(
        self, context: Context, input: Any, student_logits: Callable[[], Tensor]
    ) -> Any:
        """Return zeros of the student's shape, but with the cached classes; examples have no id."""
        logits, cached = student_logits(), self._cache.sample_shape(self._seeds[0])
        shape = [len(logits), *cached]
        if len(shape) == logits.dim():  # Else the comparison will show both.
            place = dimension_of_classes(logits, self._class_dimension)
            shape = [*logits.shape[:place], shape[place], *logits.shape[place + 1 :]]
        return logits.new_zeros(shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the hash of the teacher's weights, as the live teacher would."""
        return {"teacher_sha256": self._cache.teacher_sha256}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the teacher is the one that the checkpoint was trained with.

        Raises:
            CheckpointMismatchError: it is another one.
        """
        check_same_teacher(state, self.state_dict())


def check_same_teacher(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise CheckpointMismatchError unless both hold the hash of the same teacher."""
    if dict(state) != own:
        raise CheckpointMismatchError(
            f"the checkpoint was trained with another teacher (weights "
            f"{state.get('teacher_sha256')}, here {own['teacher_sha256']})."
        )


def make_source(config: DistillationConfig, student: nn.Module) -> TeacherSource:
    """Return the source that `config` names; `student` is still as the user gave it.

    Raises:
        ConfigError: the teacher is the student, or shares with it what training changes.
    """
    if config.teacher_cache is not None:
        return CachedTeacher(config, config.teacher_cache)
    if config.teacher_outputs == "ema":
        return AveragedStudent(config, student)
    if config.teacher_model is not None:
        with blame_option("teacher_model"):
            check_distinct(config.teacher_model, student)
        return LiveTeacher(config, config.teacher_model)
    return CallerTeacher(is_optional=not config.criterion.needs_teacher)
