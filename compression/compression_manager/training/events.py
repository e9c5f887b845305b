"""The events of the training loop: one typed method per hook."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compression_manager.cleanup import raise_failures
from compression_manager.configuration.checks import as_count
from compression_manager.context import Context
from compression_manager.errors import ConfigError, LifecycleError
from compression_manager.loss import LossTerms
from compression_manager.plugin_host.dispatch import Hooks
from compression_manager.state import restore_random_state
from compression_manager.training.lifecycle import Lifecycle
from compression_manager.training.training_state import TrainingState


class TrainingEvents:
    """The hooks that a training loop calls, in the order of `compression_manager.hookspecs`.

    A hook out of order raises LifecycleError. An exception in a plugin is a PluginError that
    names plugin and hook, unless it is one of the framework's own errors.
    """

    def __init__(
        self,
        hooks: Hooks,
        context: Context,
        lifecycle: Lifecycle,
        state: TrainingState,
    ) -> None:
        self._hooks = hooks
        self._context = context
        self._lifecycle = lifecycle
        self._state = state
        self._random_state: dict[str, Any] | None = None
        self._late_failures: list[Exception] = []

    def on_train_begin(self, dataloader: object = None) -> None:
        """Training begins; `dataloader` lets plugins know its length."""
        self._begin_call()
        given = {} if dataloader is None else {"dataloader": dataloader}
        tracked = self._context.tracked
        tracked.check(given)
        self._lifecycle.train_begin()
        tracked.register(given)
        try:
            self._hooks.on_train_begin(context=self._context, dataloader=tracked.get("dataloader"))
        except BaseException:
            # A plugin may refuse to start and ask for `resume`, which comes before training.
            self._lifecycle.cancel_training()
            raise
        if tracked.hold_nothing_of(self._context.model):
            warnings.warn(
                "no tracked optimizer has a parameter of the model, so that none trains it: was it "
                "built for another model, or before the parameters were replaced? Build it of "
                "manager.model.parameters() and track it.",
                stacklevel=2,
            )
        if self._random_state is not None:
            # Whatever drew random numbers since `resume` must not shift the continued run.
            self._state.loader.restore_generators()
            restore_random_state(self._random_state)
            self._random_state = None

    def on_epoch_begin(self, epoch: int) -> None:
        """An epoch begins."""
        self._begin_call()
        epoch = as_count("on_epoch_begin", "epoch", epoch)
        loader, position = self._state.loader, self._state.position
        if self._state.is_resumed and epoch != position.epoch:
            raise LifecycleError(
                f"on_epoch_begin({epoch}) came, but training was resumed at epoch "
                f"{position.epoch}; start the loop there: with manager.epochs(n), or "
                f"range(manager.resume(...).epoch, n)."
            )
        self._lifecycle.epoch_begin()
        self._state.is_resumed = False
        self._context.epoch = epoch
        loader.begin_epoch()
        if not loader.must_start:
            self._state.move_to(epoch, 0)
        self._hooks.on_epoch_begin(context=self._context, epoch=epoch)

    def on_step_begin(self, step: int) -> None:
        """A step begins, before the model's forward pass."""
        self._begin_call()
        step = as_count("on_step_begin", "step", step)
        self._state.loader.check_restored()
        self._context.parameter_groups.check_joined()
        self._lifecycle.step_begin()
        self._state.move_to(self._context.epoch, step)
        self._context.step = step
        self._hooks.on_step_begin(context=self._context, step=step)

    def on_after_compute_loss(
        self,
        input: Any,
        student_output: Any,
        student_loss: Tensor,
        teacher_output: Any = None,
        *,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        sample_ids: Any = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """Return the loss to differentiate: the sum of the task's and the plugins' terms.

        Args:
            input: what the model was called with: a mapping, a tuple or one object.
            student_output: what the model returned.
            student_loss: the task's own loss, a floating-point scalar tensor.
            teacher_output: the teacher's output, if the loop computes it.
            target: labels, for losses that need them.
            mask: (batch, sequence) with 1 where a position counts, for token losses.
            sample_ids: identities of the batch's samples, for teacher caches.
            num_items: positions or samples of the whole accumulated batch, for losses that divide
                by it, as those of tokens do.

        Raises:
            LossError: a term is not scalar, or the sum is not finite.
        """
        self._begin_call()
        context = self._context
        self._lifecycle.check_loss()
        losses = LossTerms(student_loss, context.task_weight)
        try:
            self._hooks.on_after_compute_loss(
                context=context,
                losses=losses,
                input=input,
                student_output=student_output,
                teacher_output=teacher_output,
                target=target,
                mask=mask,
                sample_ids=sample_ids,
                num_items=num_items,
            )
        finally:
            context.step_cache.clear()
        total = losses.total()
        needs_backward = total.requires_grad and losses.are_changed
        self._lifecycle.loss(needs_backward=needs_backward)
        if needs_backward:
            total.register_hook(self._lifecycle.backward)
        context.remember_input(input)
        for term in losses:
            context.metrics.scalar(f"loss/{term.name}", term.value)
        context.metrics.scalar("loss/total", total)
        return total

    def on_before_optimizer_step(self) -> None:
        """Gradients are complete; call it right before `optimizer.step()`."""
        self._begin_call()
        self._context.parameter_groups.check_joined()
        self._lifecycle.before_optimizer_step()
        self._count_optimizer_step()
        self._hooks.on_before_optimizer_step(context=self._context)
        self._context.parameter_groups.follow_rates()
        # With these the optimizer steps; a scheduler sets those of the next step before this ends.
        self._publish_rates()
        self._lifecycle.update_announced()

    def on_after_optimizer_step(self) -> None:
        """Parameters were updated; call it right after `optimizer.step()`."""
        self._begin_call()
        self._lifecycle.after_optimizer_step()
        self._count_optimizer_step()
        self._hooks.on_after_optimizer_step(context=self._context)

    def on_step_end(self) -> None:
        """A step ends."""
        self._begin_call()
        self._lifecycle.step_end()
        self._count_optimizer_step()
        context = self._context
        self._state.move_to(context.epoch, context.step + 1)
        context.parameter_groups.follow_rates()
        if not self._lifecycle.has_updated:  # the loop leaves the hooks around updates out
            self._publish_rates()
        self._hooks.on_step_end(context=context)
        if context.details_requested:
            context.details_requested = False
            self._hooks.publish_details(context=context)
        self._deliver_metrics()

    def on_before_eval(self) -> None:
        """Evaluation begins."""
        self._begin_call()
        self._lifecycle.before_eval()
        self._hooks.on_before_eval(context=self._context)

    def on_after_eval(self, metrics: Mapping[str, float]) -> None:
        """Evaluation ended with `metrics`, for example `{"accuracy": 0.91}`.

        Raises:
            ConfigError: a value is not a number.
        """
        self._begin_call()
        values = _numbers(metrics)
        self._lifecycle.after_eval()
        context = self._context
        self._state.evaluations.append(
            {"epoch": context.epoch, "global_step": context.global_step, "metrics": dict(values)}
        )
        for name, value in values.items():
            context.metrics.scalar(f"eval/{name}", value)
        self._hooks.on_after_eval(context=context, metrics=values)
        self._deliver_metrics()

    def on_epoch_end(self) -> None:
        """An epoch ends, its evaluation included."""
        self._begin_call()
        self._lifecycle.epoch_end(may_be_empty=self._state.loader.skipped > 0)
        self._state.move_to(self._context.epoch + 1, 0)
        self._hooks.on_epoch_end(context=self._context)
        self._deliver_metrics()

    def on_train_end(self) -> None:
        """Training ends."""
        self._begin_call()
        self._lifecycle.train_end()
        self._hooks.on_train_end(context=self._context)
        self._deliver_metrics()

    # Internals ----------------------------------------------------------------------------------

    def _publish_rates(self) -> None:
        for name, rate in self._context.tracked.learning_rates().items():
            self._context.metrics.scalar(name, rate)

    def _begin_call(self) -> None:
        if self._late_failures:
            failures, self._late_failures = self._late_failures, []
            raise_failures(failures)

    def _leave_epoch(self) -> None:
        """End an epoch whose loop was left by break or return.

        One without a step counts for nothing. Where the batches of `steps` are not used up, the
        position stays in mid-epoch.
        """
        self._begin_call()
        if self._lifecycle.epoch_is_empty:
            self._lifecycle.cancel_epoch()
            return
        self._lifecycle.epoch_end(left_early=True)
        if not self._state.loader.in_progress:
            self._state.move_to(self._context.epoch + 1, 0)
        self._hooks.on_epoch_end(context=self._context)
        self._deliver_metrics()

    def _count_optimizer_step(self) -> None:
        if self._lifecycle.close_update():
            self._context.global_step += 1

    def _deliver_metrics(self) -> None:
        metrics = tuple(self._context.metrics.drain())
        if metrics:
            self._hooks.consume_metrics(context=self._context, metrics=metrics)


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            "on_after_eval takes a mapping of names to numbers, for example "
            f"{{'accuracy': 0.91}}, got {type(metrics).__name__}."
        )
    values = {}
    for name, value in metrics.items():
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError("a text")
            values[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"on_after_eval: metric '{name}' is no number: {value!r}.") from error
    return values
