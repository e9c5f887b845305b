"""A loop of Neural Compressor, which may leave hooks out, as the manager's whole order of events.

Two things are seen without a hook: the student's forward pass in training mode, and the step of
an optimizer that holds the student's parameters. They stand in for the hooks that are missing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import compression_manager
from compression_plugins.compat.neural_compressor.outputs import PassedOutputs
from compression_plugins.compat.neural_compressor.watching import Watch, schedulers_of


class TrainingLoop:
    """Completes the events and hands them to the manager.

    Args:
        manager: of the framework.
        model: the student.
        passed: takes the teacher's output of the present loss call.
        distills: whether a plugin needs the loop's loss.

    Attributes:
        example_inputs: the arguments of the student's first training call, or None.
        is_training: whether training has begun and not ended.
        knows_optimizer: whether an optimizer of the student was seen or registered.
    """

    def __init__(
        self,
        manager: compression_manager.CompressionManager,
        model: nn.Module,
        passed: PassedOutputs,
        *,
        distills: bool,
    ) -> None:
        self.example_inputs: Any = None
        self.is_training = False
        self.knows_optimizer = False
        self._manager = manager
        self._model = model
        self._passed = passed
        self._distills = distills
        self._watch = Watch(model)
        self._was_called: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._steps = 0
        self._losses = 0
        self._announces_updates = False  # the loop does, of an optimizer that is not torch's
        self._saw_other_optimizer = False
        self._has_ended = False
        self._in_epoch = False
        self._in_step = False
        self._is_evaluating = False
        self._is_implied = False  # the present step: it ends with its update
        self._has_loss = False
        # An update waits for the optimizer that makes it known, then is open until it was made.
        self._update_waits = False
        self._update_is_open = False

    # Training and epochs -----------------------------------------------------------------------

    def begin_training(self, dataloader: object = None) -> None:
        """Begin, and watch the student and the optimizers from here on."""
        self._manager.on_train_begin(dataloader)
        self.is_training = True
        self._watch.start(self)

    def end_training(self) -> None:
        """End whatever is open, and the training."""
        self._end_parts()
        self._warn_of_no_update()
        self._close_epoch()
        self._manager.on_train_end()
        self.is_training, self._has_ended = False, True

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch; end the one that is open."""
        self._imply_training()
        self._end_parts()
        self._close_epoch()
        self._in_epoch = True
        self._manager.on_epoch_begin(epoch)

    def end_epoch(self) -> None:
        """End the epoch, if one was begun."""
        self._end_parts()
        self._warn_of_no_update()
        self._close_epoch()

    # Evaluation --------------------------------------------------------------------------------

    def begin_evaluation(self) -> None:
        """Begin an evaluation; after the training, nobody has to know of it."""
        if self._has_ended:
            return
        self._end_parts()
        self._manager.on_before_eval()
        self._is_evaluating = True

    def end_evaluation(self, metrics: Mapping[str, float] | None = None) -> None:
        """End an evaluation, whether its begin was announced or not."""
        if self._has_ended:
            return
        if not self._is_evaluating:
            self.begin_evaluation()
        self._is_evaluating = False
        self._manager.on_after_eval({} if metrics is None else metrics)

    # Steps -------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Begin a step; end the one that is open."""
        self._imply_training()
        if self._in_step and not (self._has_loss and self._sees_updates):
            # It has only begun with the forward pass; or it accumulates: parameters that plugins
            # create need the optimizer before the next step, and it is seen at its first update.
            return
        self._end_parts()
        self._open_step(step)

    def end_step(self) -> None:
        """End the step, unless it goes on until an optimizer is known."""
        if self._has_loss and not self._sees_updates and not self._update_waits:
            return
        self._close_step()

    def compute_loss(
        self,
        input: Any,
        student_output: Any,
        student_loss: Tensor,
        teacher_output: Any = None,
        **more: Any,
    ) -> Tensor:
        """Return the sum of the task's and the plugins' terms."""
        self._imply_training()
        if not self._in_step:
            self._end_parts()
            self._open_step(self._steps)
        self._passed.teacher_output = teacher_output
        try:
            total = self._manager.on_after_compute_loss(
                self._as_called(input), student_output, student_loss, teacher_output, **more
            )
        finally:
            self._passed.teacher_output = None
        self._has_loss = True
        self._losses += 1
        return total

    # Updates -----------------------------------------------------------------------------------

    def before_update(self) -> None:
        """Announce the update, or let it wait for the first optimizer."""
        if self._sees_updates:
            self._imply_loss()
            self._announce_update()
        else:
            self._update_waits = True

    def after_update(self) -> None:
        """Close the update; the optimizer's own step may have done so."""
        if self._update_waits:
            self._announce_waiting()
        if self._update_is_open:
            self._update_is_open = False
            self._manager.on_after_optimizer_step()

    # Watching ----------------------------------------------------------------------------------

    def stop_watching(self) -> None:
        """Remove the hooks of this loop."""
        self._watch.stop()

    def forward_begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The student is called in training mode."""
        if self._is_evaluating:
            return
        self._was_called = (args, kwargs)
        if self.example_inputs is None:
            self.example_inputs = _example(self._model, args, kwargs)
        if not self._in_step:
            self._open_step(self._steps)
            self._is_implied = True

    def update_begins(self, optimizer: Optimizer, *, is_of_student: bool) -> None:
        """An optimizer is about to make a step."""
        if not is_of_student:
            self._saw_other_optimizer = True
            return
        if not self.knows_optimizer:
            self.knows_optimizer = True
            schedulers = {
                "scheduler" if number == 1 else f"scheduler_{number}": scheduler
                for number, scheduler in enumerate(schedulers_of(optimizer), start=1)
            }
            self._manager.track(optimizer=optimizer, **schedulers)
        self._imply_update()

    def update_ended(self) -> None:
        """An optimizer of the student made a step."""
        self._imply_update()  # a closure computes the loss within the optimizer's step
        self.after_update()
        if self._is_implied:
            self._close_step()

    def _imply_update(self) -> None:
        if self._update_is_open or not self._in_step:
            return
        if self._was_called is not None:
            self._imply_loss()
        if self._has_loss:
            self._announce_update()

    def _imply_loss(self) -> None:
        """Without distillation a loop may leave the loss out: nobody looks at it."""
        if self._in_step and not self._has_loss and not self._distills:
            self.compute_loss(self.example_inputs, None, torch.zeros(()))

    # Internals ---------------------------------------------------------------------------------

    @property
    def _sees_updates(self) -> bool:
        return self.knows_optimizer or self._announces_updates

    def _imply_training(self) -> None:
        if not self.is_training and not self._has_ended:
            self.begin_training()

    def _close_epoch(self) -> None:
        if self._in_epoch:
            self._in_epoch = False
            self._manager.on_epoch_end()

    def _end_parts(self) -> None:
        self._close_step()
        if self._is_evaluating:
            self.end_evaluation()

    def _open_step(self, step: int) -> None:
        self._manager.on_step_begin(step)
        self._in_step = True
        self._is_implied = self._has_loss = False

    def _close_step(self) -> None:
        if not self._in_step:
            return
        if self._update_waits:
            self._announce_waiting()
        self._in_step = self._is_implied = self._has_loss = self._update_is_open = False
        self._was_called = None
        self._steps += 1
        self._manager.on_step_end()

    def _announce_waiting(self) -> None:
        """No torch optimizer made the update that the loop announced: it has one of its own."""
        self._announces_updates = True
        self._imply_loss()
        self._announce_update()

    def _announce_update(self) -> None:
        self._update_waits = False
        self._manager.on_before_optimizer_step()
        self._update_is_open = True

    def _as_called(self, input: Any) -> Any:
        """Return a list as the tuple that the student was called with, as 2.6 calls the teacher."""
        if not isinstance(input, list):
            return input
        args = () if self._was_called is None else self._was_called[0]
        return input if len(args) == 1 and args[0] is input else tuple(input)

    def _warn_of_no_update(self) -> None:
        if self._losses and self._saw_other_optimizer and not self.knows_optimizer:
            self._saw_other_optimizer = False
            warnings.warn(
                f"{self._losses} losses were computed, but the optimizer that made steps holds no "
                "parameter of manager.model, which therefore does not learn; it was probably made "
                "for another copy. Make it from manager.model.parameters().",
                stacklevel=4,
            )


def _example(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments of a call as example inputs: a tuple, or a mapping."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
