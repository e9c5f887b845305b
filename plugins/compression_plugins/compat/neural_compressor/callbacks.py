"""The hooks, as Neural Compressor calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compression_plugins.compat.neural_compressor.loop import TrainingLoop


class CallBacks:
    """The hooks, with Neural Compressor's signatures."""

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop

    def on_train_begin(self, dataloader: object = None) -> None:
        """Training begins; the first other hook implies it.

        Raises:
            LifecycleError: it has begun already.
        """
        self._loop.begin_training(dataloader)

    def on_epoch_begin(self, epoch: int) -> None:
        """An epoch begins; may be left out."""
        self._loop.begin_epoch(epoch)

    def on_step_begin(self, batch_id: int) -> None:
        """A step begins; the student's forward pass implies it."""
        self._loop.begin_step(batch_id)

    def on_after_compute_loss(
        self,
        input: Any,
        student_output: Any,
        student_loss: Tensor,
        teacher_output: Any = None,
        **further: Any,
    ) -> Tensor:
        """Return the loss to differentiate, always one scalar.

        Args:
            input: what the model was called with.
            student_output: what the model returned, its logits, or a dictionary of named outputs.
            student_loss: the task's own loss.
            teacher_output: taken instead of calling the teacher, if the loop computes it.
            **further: as `compression_manager.CompressionManager.on_after_compute_loss`.
        """
        return self._loop.compute_loss(
            input, student_output, student_loss, teacher_output, **further
        )

    def on_before_optimizer_step(self) -> None:
        """Gradients are complete; the optimizer's step implies it."""
        self._loop.before_update()

    def on_after_optimizer_step(self) -> None:
        """Parameters were updated; the optimizer's step implies it."""
        self._loop.after_update()

    def on_step_end(self) -> None:
        """A step ends; may be left out."""
        self._loop.end_step()

    def on_before_eval(self) -> None:
        """Evaluation begins; may be left out."""
        self._loop.begin_evaluation()

    def on_after_eval(self, metrics: Mapping[str, float] | None = None) -> None:
        """Evaluation ended; 2.6 passes nothing, plugins may use `metrics`."""
        self._loop.end_evaluation(metrics)

    def on_epoch_end(self) -> None:
        """An epoch ends; may be left out."""
        self._loop.end_epoch()

    def on_train_end(self) -> None:
        """Training ends."""
        self._loop.end_training()
