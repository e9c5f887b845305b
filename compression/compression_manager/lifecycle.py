"""The order in which a training loop may call the manager's hooks."""

from __future__ import annotations

from collections.abc import Mapping

from compression_manager.errors import LifecycleError


class Lifecycle:
    """Refuses hooks that come in a wrong order, and says which call is missing.

    Args:
        required: optional hook -> names of the plugins that cannot do without it.
    """

    def __init__(self, required: Mapping[str, list[str]]) -> None:
        self._required = required
        self.training = False
        self.in_epoch = False
        self.in_step = False
        self.evaluating = False
        self.closed = False
        self._steps_in_epoch = 0
        self._evaluated_in_epoch = False
        self._losses_since_update = 0
        self._update_is_open = False

    @property
    def accumulating(self) -> bool:
        """Whether losses were computed since the last optimizer step."""
        return self._losses_since_update > 0

    def train_begin(self) -> None:
        """Enter training."""
        self._check_open("on_train_begin")
        if self.training:
            raise LifecycleError("on_train_begin was called twice; call on_train_end in between.")
        self.training = True

    def epoch_begin(self) -> None:
        """Enter an epoch."""
        self._check_training("on_epoch_begin")
        if self.in_epoch:
            raise LifecycleError("on_epoch_begin was called twice; call on_epoch_end in between.")
        self.in_epoch = True
        self._steps_in_epoch = 0
        self._evaluated_in_epoch = False

    def step_begin(self) -> None:
        """Enter a step."""
        self._check_training("on_step_begin")
        if self.in_step:
            raise LifecycleError("on_step_begin was called twice; call on_step_end in between.")
        self._check_not_evaluating("on_step_begin")
        self.in_step = True
        self._steps_in_epoch += 1

    def loss(self) -> None:
        """A loss was computed inside a step."""
        self._check_step("on_after_compute_loss")
        self._losses_since_update += 1

    def before_optimizer_step(self) -> None:
        """The optimizer is about to step."""
        self._check_step("on_before_optimizer_step")
        if not self.accumulating:
            raise LifecycleError(
                "on_before_optimizer_step came before any loss; call "
                "loss = manager.on_after_compute_loss(inputs, output, loss) and "
                "loss.backward() first."
            )
        self._check_update_was_closed()
        self._update_is_open = True
        self._losses_since_update = 0

    def after_optimizer_step(self) -> None:
        """The optimizer stepped."""
        self._check_step("on_after_optimizer_step")
        if not self._update_is_open:
            raise LifecycleError(
                "on_after_optimizer_step came without on_before_optimizer_step before it."
            )
        self._update_is_open = False

    def step_end(self) -> None:
        """Leave a step."""
        self._check_step("on_step_end")
        self._check_update_was_closed()
        self._update_is_open = False
        self.in_step = False

    def before_eval(self) -> None:
        """The user evaluates from here on."""
        self._check_open("on_before_eval")
        if self.in_step:
            raise LifecycleError("on_before_eval was called inside a step; call on_step_end first.")
        self._check_not_evaluating("on_before_eval")
        self.evaluating = True

    def after_eval(self) -> None:
        """The user has evaluated."""
        if not self.evaluating:
            raise LifecycleError("on_after_eval was called without on_before_eval before it.")
        self.evaluating = False
        self._evaluated_in_epoch = True

    def epoch_end(self, *, resumed_at_end: bool) -> None:
        """Leave an epoch; `resumed_at_end` when all its batches were consumed before resuming."""
        self._check_open("on_epoch_end")
        if not self.in_epoch:
            raise LifecycleError("on_epoch_end was called without on_epoch_begin before it.")
        if self.in_step:
            raise LifecycleError("on_epoch_end was called inside a step; call on_step_end first.")
        self._check_not_evaluating("on_epoch_end")
        if self._steps_in_epoch == 0 and not resumed_at_end:
            raise LifecycleError(
                "the epoch ended without a single step: the data loader is empty, or "
                "on_step_begin is missing from the loop."
            )
        for hook in ("on_before_eval", "on_after_eval"):
            if hook in self._required and not self._evaluated_in_epoch:
                raise LifecycleError(
                    f"{_names(self._required[hook])} needs {hook} in every epoch; call "
                    "manager.on_before_eval() and manager.on_after_eval({'accuracy': ...}) "
                    "before manager.on_epoch_end()."
                )
        self.in_epoch = False

    def train_end(self) -> None:
        """Leave training."""
        self._check_training("on_train_end")
        for is_open, begin, end in (
            (self.in_step, "on_step_begin", "on_step_end"),
            (self.in_epoch, "on_epoch_begin", "on_epoch_end"),
        ):
            if is_open:
                raise LifecycleError(f"on_train_end came before the {end} that {begin} needs.")
        self.training = False

    def resume_accumulation(self, accumulating: bool) -> None:
        """Take over from a checkpoint whether losses wait for an optimizer step."""
        self._losses_since_update = int(accumulating)

    def abandon(self) -> None:
        """Forget whatever was open: the loop's body raised."""
        self.training = self.in_epoch = self.in_step = self.evaluating = False
        self._update_is_open = False
        self._losses_since_update = 0

    def check_before_training(self, action: str) -> None:
        """Raise LifecycleError if training is under way or the manager is closed."""
        self._check_open(action)
        if self.training:
            raise LifecycleError(f"{action} must be called before on_train_begin.")

    def _check_open(self, hook: str) -> None:
        if self.closed:
            raise LifecycleError(f"{hook} was called on a closed manager; prepare a new one.")

    def _check_training(self, hook: str) -> None:
        self._check_open(hook)
        if not self.training:
            raise LifecycleError(f"{hook} was called before on_train_begin.")

    def _check_step(self, hook: str) -> None:
        self._check_training(hook)
        if not self.in_step:
            raise LifecycleError(f"{hook} was called outside of a step; call on_step_begin first.")

    def _check_not_evaluating(self, hook: str) -> None:
        if self.evaluating:
            raise LifecycleError(f"{hook} came between on_before_eval and on_after_eval.")

    def _check_update_was_closed(self) -> None:
        hook = "on_after_optimizer_step"
        if self._update_is_open and hook in self._required:
            raise LifecycleError(
                f"{_names(self._required[hook])} needs {hook}; call it after optimizer.step()."
            )


def _names(plugins: list[str]) -> str:
    return " and ".join(f"plugin '{name}'" for name in plugins)
