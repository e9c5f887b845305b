"""The distillation plugin: one source of teacher outputs, one criterion."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from compression_manager import Plugin, hookimpl
from compression_manager.context import Context
from compression_manager.errors import CheckpointMismatchError, blame_option
from compression_manager.loss import LossTerms
from compression_manager.models.calling import call_model, quiet_evaluation
from compression_manager.quantization.fused_paths import disable_fused_paths
from compression_manager.ranks import has_other_ranks, mean_of_ranks, values_of_first_rank
from compression_plugins.distillation import preflight
from compression_plugins.distillation.classes import classes_last
from compression_plugins.distillation.config import DistillationConfig
from compression_plugins.distillation.criteria import Comparison, Surroundings
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.catalog import CATALOG, NamedLoss, make_loss
from compression_plugins.distillation.outputs import pick_logits
from compression_plugins.distillation.sources import TeacherSource, make_source


class DistillationPlugin(Plugin[DistillationConfig]):
    """Adds loss terms `<instance>/...`; several instances with one teacher run it once."""

    config_class = DistillationConfig

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__(config)
        self._context: Context | None = None
        self._source: TeacherSource | None = None
        self._comparison: Comparison | None = None
        self._is_checked = False
        self._has_told = False
        self._is_accumulating = False
        self._take_parameters_away: Callable[[], None] | None = None
        self._trained: dict[str, nn.Parameter] = {}

    def required_hooks(self) -> frozenset[str]:
        """Return the hook at which a moving average follows the student."""
        averages = self.config.teacher_outputs == "ema"
        return frozenset({"on_after_optimizer_step"} if averages else ())

    @hookimpl
    def validate_composition(self, context: Context) -> None:
        """Refuse a teacher that is the student, or shares with it what training changes."""
        self._context = context
        self._source = make_source(self.config, context.model)

    @hookimpl
    def prepare_model(self, context: Context) -> None:
        """Freeze the teacher, watch layers; with example inputs, compare the outputs' shapes."""
        criterion, source = self.config.criterion, self._teacher_source
        if criterion.task_weight is not None:
            with blame_option(f"criterion.{criterion.task_weight_option}"):
                context.set_task_weight(self.name, criterion.task_weight)
        source.prepare(context, self.name)
        if source.model is not None and criterion.needs_teacher_layers:
            # torch's fused inference paths call no layer that could be watched.
            context.add_cleanup(disable_fused_paths(source.model), owner=self.name)
        with blame_option("criterion"):
            self._comparison = criterion.compare(
                Surroundings(
                    student=context.model,
                    teacher=source.model,
                    hooks=context.model_hooks,
                    make_loss=self._make_loss,
                    student_logits=self._student_logits,
                    teacher_logits=self._teacher_logits,
                )
            )
        if context.example_inputs is not None and not self._takes_from_loop:
            self._check_example(context)

    @hookimpl(trylast=True)
    def make_distillation_loss(
        self, name: str, options: Mapping[str, Any]
    ) -> Callable[..., Tensor] | None:
        """Answer the service for the built-in losses."""
        return make_loss(name, options) if name in CATALOG else None

    @hookimpl
    def on_step_begin(self) -> None:
        """Keep features from here on."""
        for recorder in self._running.recorders:
            recorder.start()

    @hookimpl
    def on_after_compute_loss(
        self,
        context: Context,
        losses: LossTerms,
        input: Any,
        student_output: Any,
        teacher_output: Any,
        target: Tensor | None,
        mask: Tensor | None,
        sample_ids: Any,
        num_items: int | Tensor | None,
    ) -> None:
        """Add the weighted comparison of both models."""
        batch = Batch(
            input,
            student_output,
            self._teacher_source.outputs(context, input, teacher_output, sample_ids),
            target,
            mask,
            num_items,
            context.global_step,
        )
        comparison = self._running
        try:
            if not self._is_checked:
                with blame_option("criterion"):
                    comparison.check(batch)
                self._train_parameters(context)
                self._look_ahead(context, batch)
                self._is_checked = True
            with blame_option("criterion"):
                comparison.add_terms(batch, losses, self.name)
            is_used = num_items is None or "num_items" in batch.asked
            if self._is_accumulating and not is_used:
                self._tell_that_terms_are_means()
            self._is_accumulating = True
        finally:
            for recorder in comparison.recorders:
                recorder.clear()

    @hookimpl
    def on_before_optimizer_step(self) -> None:
        """Average the gradients of projections over the ranks: DDP does not know them."""
        self._is_accumulating = False
        if not (self.config.synchronize and has_other_ranks()):
            return
        for parameter in self._trained.values():
            if parameter.grad is not None:
                mean_of_ranks(parameter.grad)

    @hookimpl
    def on_after_optimizer_step(self, context: Context) -> None:
        """Let a moving average follow."""
        self._teacher_source.follow(context.model)

    @hookimpl
    def on_step_end(self) -> None:
        """Let go of features."""
        self._stop_recording()

    @hookimpl
    def on_exception(self) -> None:
        """Let go of features."""
        self._stop_recording()

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's hash (its weights are never saved) and what the criterion trains."""
        state = self._teacher_source.state_dict()
        trained = self._running.state_dict()
        return {**state, "criterion": trained} if trained else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the teacher is the same, and restore what the criterion trains.

        Raises:
            CheckpointMismatchError: it is another teacher or criterion.
        """
        source = {key: value for key, value in state.items() if key != "criterion"}
        try:
            self._teacher_source.load_state_dict(source)
            self._running.load_state_dict(state.get("criterion", {}))
        except CheckpointMismatchError as error:
            raise CheckpointMismatchError(f"plugin '{self.name}': {error}") from error
        if self._context is not None:
            self._train_parameters(self._context)

    # Internals -------------------------------------------------------------------------------

    def _tell_that_terms_are_means(self) -> None:
        if not self._has_told:
            self._has_told = True
            warnings.warn(
                f"plugin '{self.name}': no loss of its criterion divides by num_items, which the "
                "loop passes; its terms are means over the batch. Let the task's loss be one as "
                "well, and divide the total by the number of batches that are accumulated. Losses "
                "of tokens (TokenDistillationLossConfig) and losses of your own that name "
                "num_items divide by it.",
                stacklevel=2,
            )

    @property
    def _teacher_source(self) -> TeacherSource:
        assert self._source is not None  # set by validate_composition
        return self._source

    @property
    def _running(self) -> Comparison:
        assert self._comparison is not None  # set by prepare_model
        return self._comparison

    @property
    def _takes_from_loop(self) -> bool:
        config = self.config
        return config.criterion.needs_teacher and config.teacher_outputs == "caller"

    def _make_loss(
        self, name: str, options: Mapping[str, Any], chosen_by: str, known: Iterable[str]
    ) -> NamedLoss:
        assert self._context is not None  # set by validate_composition
        with blame_option(chosen_by):
            services = self._context.services
            function = services.make_distillation_loss(name, options, known=known)
        return NamedLoss(name, function)

    def _student_logits(self, output: Any) -> Tensor:
        return classes_last(self._student_output(output), self.config.criterion.class_dimension)

    def _student_output(self, output: Any) -> Tensor:
        return pick_logits(output, self.config.output, where="student", option="output")

    def _teacher_logits(self, output: Any) -> Tensor:
        key = self.config.teacher_output
        logits = pick_logits(output, key, where="teacher", option="teacher_output")
        return classes_last(logits, self.config.criterion.class_dimension)

    def _check_example(self, context: Context) -> None:
        inputs, source, comparison = context.example_inputs, self._teacher_source, self._running
        models = [model for model in (context.model, source.model) if model is not None]
        self.on_step_begin()
        try:
            with quiet_evaluation(*models):
                student_output = call_model(context.model, inputs)
                teacher_output = source.example_outputs(
                    context, inputs, lambda: self._student_output(student_output)
                )
                batch = Batch(inputs, student_output, teacher_output, is_training=False)
                with blame_option("criterion"):
                    comparison.check(batch)
                self._note_costs(context)
        finally:
            self._stop_recording()
            context.step_cache.clear()
        self._train_parameters(context)

    def _stop_recording(self) -> None:
        for recorder in self._running.recorders:
            recorder.stop()

    def _train_parameters(self, context: Context) -> None:
        """Have the optimizer train exactly what the comparison consists of now."""
        parameters = dict(self._running.parameters())
        if {id(value) for value in parameters.values()} == {id(v) for v in self._trained.values()}:
            return
        if self._take_parameters_away is not None:
            self._take_parameters_away()
            self._take_parameters_away = None
        self._trained = parameters
        if self.config.synchronize and has_other_ranks():
            for parameter in parameters.values():
                values_of_first_rank(parameter.data)
        if parameters:
            self._take_parameters_away = context.add_parameters(parameters, owner=self.name)

    def _note_costs(self, context: Context) -> None:
        teacher = self._teacher_source.model
        kept = sum(recorder.bytes() for recorder in self._running.recorders)
        memory = preflight.describe_memory(context.model, teacher, kept)
        remark = self._teacher_source.remark()
        context.note(self.name, f"{memory}; {remark}" if remark else memory)

    def _look_ahead(self, context: Context, batch: Batch) -> None:
        config = self.config
        self._note_costs(context)
        is_trained = config.criterion.needs_teacher and config.teacher_outputs == "model"
        # A resumed run was told already.
        labels = preflight.comparable_labels(batch, config.criterion)
        if is_trained and labels is not None and batch.global_step == 0:
            preflight.warn_if_worse(
                labels,
                student=lambda: self._student_logits(batch.student_output),
                teacher=lambda: self._teacher_logits(batch.teacher_output),
                plugin=self.name,
            )
