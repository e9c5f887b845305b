"""The distillation plugin: one teacher, one criterion, one loss term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from compression_manager import Plugin, hookimpl
from compression_manager.context import Context
from compression_manager.errors import (
    CheckpointMismatchError,
    ConfigError,
    blame_option,
    suggest,
)
from compression_manager.loss import LossTerms
from compression_manager.model_call import call_model, quiet_evaluation
from compression_plugins.distillation import losses as loss_functions
from compression_plugins.distillation.config import DistillationConfig
from compression_plugins.distillation.outputs import pick_logits
from compression_plugins.distillation.teacher import Teacher, check_distinct

LogitLoss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "CE": loss_functions.soft_cross_entropy,
    "KL": loss_functions.kd_loss,
    "MSE": loss_functions.mse_loss,
}


class DistillationPlugin(Plugin[DistillationConfig]):
    """Adds the loss term `<instance>/<D>`; several instances with one teacher run it once."""

    config_class = DistillationConfig

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__(config)
        self._teacher = (
            None
            if config.teacher_model is None
            else Teacher(config.teacher_model, config.teacher_forward)
        )
        self._loss: LogitLoss | None = None
        self._teacher_hash: str | None = None

    @hookimpl
    def validate_composition(self, context: Context) -> None:
        """Refuse a teacher that is the student, or shares with it what training changes."""
        if self._teacher is not None:
            with blame_option("teacher_model"):
                check_distinct(self._teacher.model, context.model)

    @hookimpl
    def prepare_model(self, context: Context) -> None:
        """Freeze the teacher; with example inputs, compare the logits' shapes."""
        criterion = self.config.criterion
        with blame_option("criterion.loss_weights[0]"):
            context.set_task_weight(self.name, criterion.loss_weights[0])
        # Only the plugin that offers the loss knows its options.
        with blame_option("criterion" if criterion.loss_options else "criterion.loss_types[1]"):
            self._loss = context.services.make_distillation_loss(
                criterion.loss_types[1],
                {"temperature": criterion.temperature, **criterion.loss_options},
            )
        if self._teacher is None:
            return
        self._teacher.freeze(context, self.name)
        if context.example_inputs is not None:
            self._check_example(context, self._teacher)

    @hookimpl(trylast=True)
    def make_distillation_loss(self, name: str, options: Mapping[str, Any]) -> LogitLoss:
        """Answer the service for `CE`, `KL` and `MSE`."""
        if name not in LOSSES:
            raise ConfigError(
                f"no plugin offers the distillation loss '{name}'; {suggest(name, LOSSES)}"
            )
        known = {"temperature"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(
                f"the distillation loss '{name}' has no option '{unknown[0]}'; "
                f"{suggest(unknown[0], known)}"
            )
        function, temperature = LOSSES[name], options["temperature"]
        return lambda student, teacher: function(student, teacher, temperature)

    @hookimpl
    def on_after_compute_loss(
        self,
        context: Context,
        losses: LossTerms,
        input: Any,
        student_output: Any,
        teacher_output: Any,
    ) -> None:
        """Add the weighted comparison of both logits."""
        config = self.config
        if self._teacher is not None:
            teacher_output = self._run_teacher(context, self._teacher, input)
        elif teacher_output is None:
            raise ConfigError(
                f"plugin '{self.name}' has teacher_outputs='caller', but on_after_compute_loss got "
                "no teacher_output; pass it as the fourth argument."
            )
        student = pick_logits(student_output, config.output, where="student", option="output")
        teacher = pick_logits(
            teacher_output, config.teacher_output, where="teacher", option="teacher_output"
        )
        check_same_logits(student, teacher)
        assert self._loss is not None  # set by prepare_model
        name, weight = config.criterion.loss_types[1], config.criterion.loss_weights[1]
        losses.add(f"{self.name}/{name}", self._loss(student, teacher.detach()), weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the hash of the teacher's weights; the weights themselves are never saved."""
        if self._teacher is None:
            return {}
        if self._teacher_hash is None:
            self._teacher_hash = self._teacher.weights_hash()
        return {"teacher_sha256": self._teacher_hash}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the teacher is the one that the checkpoint was trained with.

        Raises:
            CheckpointMismatchError: it is another one.
        """
        own = self.state_dict()
        if dict(state) != own:
            raise CheckpointMismatchError(
                f"plugin '{self.name}': the checkpoint was trained with another teacher "
                f"(weights {state.get('teacher_sha256')}, here {own.get('teacher_sha256')})."
            )

    def _run_teacher(self, context: Context, teacher: Teacher, input: Any) -> Any:
        key = ("teacher", id(teacher.model), id(self.config.teacher_forward))
        if key not in context.step_cache:
            context.step_cache[key] = teacher.run(input)
        return context.step_cache[key]

    def _check_example(self, context: Context, teacher: Teacher) -> None:
        config = self.config
        with quiet_evaluation(context.model, teacher.model):
            student_output = call_model(context.model, context.example_inputs)
            teacher_output = teacher.run(context.example_inputs)
        check_same_logits(
            pick_logits(student_output, config.output, where="student", option="output"),
            pick_logits(
                teacher_output, config.teacher_output, where="teacher", option="teacher_output"
            ),
        )


def check_same_logits(student: Tensor, teacher: Tensor) -> None:
    """Raise ConfigError unless both logits have the same shape."""
    if student.shape != teacher.shape:
        what = "classes" if student.shape[:-1] == teacher.shape[:-1] else "shapes"
        raise ConfigError(
            f"student and teacher logits differ in their {what}: {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; both models must predict the same classes for the same batch."
        )
