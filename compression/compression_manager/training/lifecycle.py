"""The order in which a training loop may call the manager's hooks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from compression_manager.errors import LifecycleError

# So many losses without one optimizer step are hardly an accumulation; the hook is missing.
_MANY_LOSSES = 10


class Lifecycle:
    """Refuses hooks that come in a wrong order, and says which call is missing.

    A refused call changes nothing.

    Args:
        required: optional hook -> names of the plugins that cannot do without it.

    Attributes:
        closed: whether the manager is closed.
        closed_by_exception: whether that was because the loop raised an exception.
        accumulating: whether losses were computed since the last optimizer step.
        has_updated: whether the loop announced an optimizer step in this training.
        epochs_begun: number of epochs begun; identifies the present one.
        steps_begun: number of steps begun; identifies the present one.
    """

    def __init__(self, required: Mapping[str, list[str]]) -> None:
        self._required = required
        self.training = False
        self.in_epoch = False
        self.in_step = False
        self.evaluating = False
        self.closed = False
        self.closed_by_exception = False
        self.accumulating = False
        self._is_differentiated = False
        self.epochs_begun = 0
        self.steps_begun = 0
        self._steps_in_epoch = 0
        self._steps_outside_epochs = False
        self._evaluated = False
        self._step_has_loss = False
        # An update is announced while plugins see on_before_optimizer_step, then open until
        # on_after_optimizer_step or, where the loop leaves that out, the next event.
        self._update_is_announced = False
        self._update_is_open = False
        self._losses_without_update = 0
        self.has_updated = False
        self._has_warned = False

    @property
    def step_is_done(self) -> bool:
        """Whether the present step has a loss, so that a state saved now includes the step."""
        return self.in_step and self._step_has_loss and not self._update_is_announced

    @property
    def uncounted_updates(self) -> int:
        """Optimizer steps (0 or 1) that happened and are not yet in `global_step`."""
        return int(self._update_is_open)

    @property
    def epoch_is_empty(self) -> bool:
        """Whether no step was begun in the present epoch."""
        return self._steps_in_epoch == 0

    def train_begin(self) -> None:
        """Enter training."""
        self.check_open("on_train_begin")
        if self.training:
            raise LifecycleError("on_train_begin was called twice; call on_train_end in between.")
        self._check_not_evaluating("on_train_begin")
        self.training = True
        self._steps_outside_epochs = False
        self._evaluated = False

    def epoch_begin(self) -> None:
        """Enter an epoch."""
        self._check_training("on_epoch_begin")
        if self.in_epoch:
            raise LifecycleError("on_epoch_begin was called twice; call on_epoch_end in between.")
        self._check_outside_of_step("on_epoch_begin")
        self._check_not_evaluating("on_epoch_begin")
        self.in_epoch = True
        self.epochs_begun += 1
        self._steps_in_epoch = 0
        self._evaluated = False

    def step_begin(self) -> None:
        """Enter a step."""
        self._check_training("on_step_begin")
        if self.in_step:
            raise LifecycleError("on_step_begin was called twice; call on_step_end in between.")
        self._check_not_evaluating("on_step_begin")
        if not self.in_epoch and "on_epoch_begin" in self._required:
            raise LifecycleError(
                f"{_names(self._required['on_epoch_begin'])} counts epochs, but a step began "
                "outside of an epoch; call manager.on_epoch_begin(epoch) first (or loop with "
                "manager.epochs(n)), or give its options in optimizer steps."
            )
        self.in_step = True
        self.steps_begun += 1
        self._steps_in_epoch += 1
        self._steps_outside_epochs |= not self.in_epoch
        self._step_has_loss = False

    def check_loss(self) -> None:
        """Raise LifecycleError unless a loss may be computed now."""
        self._check_step("on_after_compute_loss")

    def loss(self, *, needs_backward: bool) -> None:
        """A loss was computed inside a step; `backward` must follow if plugins changed it."""
        self.accumulating = True
        self._is_differentiated |= not needs_backward
        self._step_has_loss = True
        self._losses_without_update += 1

    def resume(self, *, accumulating: bool) -> None:
        """Continue where losses were computed, and differentiated, since the last update."""
        self.accumulating = self._is_differentiated = accumulating

    def backward(self, gradient: object) -> None:
        """A loss is being differentiated."""
        self._is_differentiated = True

    def before_optimizer_step(self) -> None:
        """The optimizer is about to step; `update_announced` follows."""
        self._check_step("on_before_optimizer_step")
        if not self.accumulating:
            raise LifecycleError(
                "on_before_optimizer_step came before any loss; call "
                "loss = manager.on_after_compute_loss(inputs, output, loss) and "
                "loss.backward() first."
            )
        if not self._is_differentiated:
            raise LifecycleError(
                "on_before_optimizer_step came, but nobody called backward() on the loss that "
                "on_after_compute_loss returned: plugins add their terms to it, and the task's own "
                "loss lacks them. Write loss = manager.on_after_compute_loss(inputs, output, loss) "
                "and then loss.backward()."
            )
        self._check_update_was_closed()
        self._is_differentiated = False
        self._update_is_announced = True
        self.has_updated = True
        self.accumulating = False

    def update_announced(self) -> None:
        """All plugins have seen `on_before_optimizer_step`."""
        self._update_is_announced = False
        self._update_is_open = True

    def after_optimizer_step(self) -> None:
        """The optimizer stepped; `close_update` follows."""
        self._check_step("on_after_optimizer_step")
        if not self._update_is_open:
            raise LifecycleError(
                "on_after_optimizer_step came without on_before_optimizer_step before it."
            )

    def close_update(self) -> bool:
        """Return whether an optimizer step was open, which is now counted."""
        was_open, self._update_is_open = self._update_is_open, False
        return was_open

    def step_end(self) -> None:
        """Leave a step; `close_update` follows."""
        self._check_step("on_step_end")
        self._check_update_was_closed()
        self._update_is_announced = False
        self.in_step = False

    def before_eval(self) -> None:
        """The user evaluates from here on."""
        self.check_open("on_before_eval")
        self._check_outside_of_step("on_before_eval")
        self._check_not_evaluating("on_before_eval")
        self.evaluating = True

    def after_eval(self) -> None:
        """The user has evaluated."""
        self.check_open("on_after_eval")
        if not self.evaluating:
            raise LifecycleError("on_after_eval was called without on_before_eval before it.")
        self.evaluating = False
        self._evaluated = True

    def epoch_end(self, *, may_be_empty: bool = False, left_early: bool = False) -> None:
        """Leave an epoch.

        Args:
            may_be_empty: all its batches were consumed before resuming.
            left_early: the loop was left by break or return, so that no evaluation is due.
        """
        self.check_open("on_epoch_end")
        if not self.in_epoch:
            raise LifecycleError("on_epoch_end was called without on_epoch_begin before it.")
        self._check_outside_of_step("on_epoch_end")
        self._check_not_evaluating("on_epoch_end")
        if self.epoch_is_empty and not may_be_empty:
            raise LifecycleError(
                "the epoch ended without a single step: the data loader is empty, or "
                "on_step_begin is missing from the loop."
            )
        if not left_early:
            self._check_evaluated("in every epoch", "on_epoch_end")
            self._warn_if_never_updated()
        self.in_epoch = False

    def cancel_training(self) -> None:
        """Forget a training that a plugin refused to begin."""
        self.training = False

    def cancel_epoch(self) -> None:
        """Forget an epoch that was left before its first step."""
        self.in_epoch = False

    def train_end(self) -> None:
        """Leave training."""
        self._check_training("on_train_end")
        for is_open, begin, end in (
            (self.in_step, "on_step_begin", "on_step_end"),
            (self.evaluating, "on_before_eval", "on_after_eval"),
            (self.in_epoch, "on_epoch_begin", "on_epoch_end"),
        ):
            if is_open:
                raise LifecycleError(f"on_train_end came before the {end} that {begin} needs.")
        if self._steps_outside_epochs:
            self._check_evaluated("at least once", "on_train_end")
            self._warn_if_never_updated()
        self.training = False

    def abandon_step(self) -> None:
        """Forget the open step: the loop's body raised."""
        self.in_step = False
        self._update_is_announced = self._update_is_open = False

    def abandon(self) -> None:
        """Forget whatever was open: the loop's body raised."""
        self.abandon_step()
        self.training = self.in_epoch = self.evaluating = False
        self.accumulating = False

    def check_open(self, action: str) -> None:
        """Raise LifecycleError if the manager is closed."""
        if not self.closed:
            return
        if self.closed_by_exception:
            raise LifecycleError(
                f"{action} was called on a manager that an exception in its loop has closed: the "
                "model is a float model again, with the weights of that moment. Prepare a new "
                "manager, and resume, or call load_weights, where there are checkpoints."
            )
        raise LifecycleError(f"{action} was called on a closed manager; prepare a new one.")

    def check_before_training(self, action: str) -> None:
        """Raise LifecycleError if training is under way or the manager is closed."""
        self.check_open(action)
        if self.training:
            raise LifecycleError(f"{action} must be called before on_train_begin.")

    def check_can_save(self) -> None:
        """Raise LifecycleError in the middle of a step's work, which no state can describe."""
        if not self.in_step:
            return
        if not self.step_is_done:
            raise LifecycleError(
                "the training state was asked for in the middle of a step's work; ask between "
                "two steps, or at the end of the step, after optimizer.step()."
            )
        self._check_update_was_closed()

    def _check_training(self, hook: str) -> None:
        self.check_open(hook)
        if not self.training:
            raise LifecycleError(f"{hook} was called before on_train_begin.")

    def _check_step(self, hook: str) -> None:
        self._check_training(hook)
        if not self.in_step:
            raise LifecycleError(f"{hook} was called outside of a step; call on_step_begin first.")

    def _check_outside_of_step(self, hook: str) -> None:
        if self.in_step:
            raise LifecycleError(f"{hook} was called inside a step; call on_step_end first.")

    def _check_not_evaluating(self, hook: str) -> None:
        if self.evaluating:
            raise LifecycleError(
                f"{hook} came between on_before_eval and on_after_eval; call on_after_eval first."
            )

    def _check_evaluated(self, how_often: str, end: str) -> None:
        for hook in ("on_before_eval", "on_after_eval"):
            if hook in self._required and not self._evaluated:
                raise LifecycleError(
                    f"{_names(self._required[hook])} needs {hook} {how_often}; call "
                    "manager.on_before_eval() and manager.on_after_eval({'accuracy': ...}) "
                    f"before manager.{end}()."
                )

    def _warn_if_never_updated(self) -> None:
        """Tell once that a hook is probably missing; accumulating for so long is possible."""
        if self.has_updated or self._has_warned or self._losses_without_update < _MANY_LOSSES:
            return
        self._has_warned = True
        warnings.warn(
            f"{self._losses_without_update} losses were computed, but on_before_optimizer_step was "
            "never called, so that no plugin counts a step and quantization-aware training does "
            "not start; call manager.on_before_optimizer_step() right before optimizer.step().",
            stacklevel=4,
        )

    def _check_update_was_closed(self) -> None:
        hook = "on_after_optimizer_step"
        if self._update_is_open and hook in self._required:
            raise LifecycleError(
                f"{_names(self._required[hook])} needs {hook}; call it after optimizer.step()."
            )


def _names(plugins: list[str]) -> str:
    return " and ".join(f"plugin '{name}'" for name in plugins)
