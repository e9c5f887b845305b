"""The shorter loop: generators that fire the paired events around the user's body."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from compression_manager.cleanup import raise_failures
from compression_manager.configuration.checks import as_count
from compression_manager.errors import ConfigError, LifecycleError
from compression_manager.plugin_host.loading import announce_exception
from compression_manager.tracking.tracked import is_iterable
from compression_manager.training.events import TrainingEvents
from compression_manager.training.loop_exit import left_by_exception

Batch = TypeVar("Batch")


class TrainingLoops(TrainingEvents):
    """`epochs` and `steps`, the context manager, and what follows when they are left."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._entered = False
        self._step_of_loop: int | None = None

    def epochs(self, total: int) -> Iterator[int]:
        """Yield the epochs from the present position to `total - 1`, with their events.

        Fires train and epoch begin and end, and stops when `should_stop` is true. When the body
        raises, the plugins' `on_exception` runs and the manager closes. Leaving the loop by break
        or return ends the epoch and the training; if the batches of `steps` were not used up,
        the position stays within the epoch.
        """
        return self._run_epochs(as_count("epochs", "total", total))

    def steps(self, loader: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Yield `(step, batch)` with the step events around the body.

        After `resume` in mid-epoch, the consumed batches are skipped.

        Raises:
            ConfigError: the loader yields no batch.
            CheckpointMismatchError: it is not the loader that was trained with.
        """
        if not is_iterable(loader):
            raise ConfigError(f"steps takes a data loader, got {type(loader).__name__}.")
        return self._run_steps(loader)

    def close(self) -> None:
        """Give the float model back: remove hooks, restore classes and modes, close writers.

        All plugins are closed, whatever one of them raises; a second call does nothing.
        """
        self._lifecycle.closed = True
        late, self._late_failures = self._late_failures, []
        raise_failures([*late, *self._context.run_cleanup()])

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._abort(error)
        else:
            self.close()

    # The generators --------------------------------------------------------------------------

    def _run_epochs(self, total: int) -> Iterator[int]:
        with self._watched(self._lifecycle.abandon):
            self.on_train_begin()
            for epoch in range(self._state.position.epoch, total):
                if self._context.should_stop:
                    break
                self.on_epoch_begin(epoch)
                present = self._lifecycle.epochs_begun
                try:
                    yield epoch
                except GeneratorExit:
                    if self._lifecycle.in_epoch and self._lifecycle.epochs_begun == present:
                        ends = (self._end_held_step, self._leave_epoch, self.on_train_end)
                        self._dropped(self._lifecycle.abandon, *ends)
                    return
                self._end_held_step()
                self.on_epoch_end()
            self.on_train_end()

    def _run_steps(self, loader: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        with self._watched(self._lifecycle.abandon_step):
            position = self._state.loader
            consumed = position.consumed
            empty = consumed == 0
            for step, batch in enumerate(position.start(loader), start=consumed):
                empty = False
                position.passed_on(batch)
                self.on_step_begin(step)
                present = self._step_of_loop = self._lifecycle.steps_begun
                try:
                    yield step, batch
                except GeneratorExit:
                    if self._is_in_step(present):
                        self._dropped(self._lifecycle.abandon_step, self.on_step_end)
                    return
                self.on_step_end()
            position.finish()
            if empty:
                hint = (
                    "it is an iterator, which is used up after one epoch; make a new one for every "
                    "epoch, or pass what it was made from."
                    if isinstance(loader, Iterator)
                    else "check the data set's size, batch_size and drop_last."
                )
                raise ConfigError(
                    f"the data loader ({type(loader).__name__}) yielded no batch; {hint}"
                )

    # How they are left -----------------------------------------------------------------------

    def _is_in_step(self, number: int | None) -> bool:
        lifecycle = self._lifecycle
        return lifecycle.in_step and not lifecycle.closed and lifecycle.steps_begun == number

    def _end_held_step(self) -> None:
        """End the step of a `steps` loop that was left by break but is still held by a variable.

        `bar = tqdm(manager.steps(loader))` outlives its loop.
        """
        if self._is_in_step(self._step_of_loop):
            self.on_step_end()

    @contextmanager
    def _watched(self, abandon: Callable[[], None]) -> Iterator[None]:
        """Treat what the loop itself raises (a hook, the data loader) as its body's exception."""
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            if self._entered:
                abandon()
            else:
                self._abort(error)
            raise

    def _dropped(self, abandon: Callable[[], None], *ends: Callable[[], None]) -> None:
        """The loop was left before its end: fire the events that end it, unless its body raised.

        Python discards what is raised while a generator is dropped, so failures are kept and
        raised by the next call.
        """
        # The generator's own frame called this one.
        generator = sys._getframe().f_back
        if generator is None or not left_by_exception(generator.f_back):
            try:
                for end in ends:
                    end()
            except Exception as error:
                self._late_failures.append(error)
        elif self._entered:
            # The exception itself arrives at `with manager`, or is handled inside of it.
            abandon()
        else:
            unknown = LifecycleError("the body of the training loop raised an exception.")
            self._late_failures = self._close_after(unknown)

    def _abort(self, error: BaseException) -> None:
        """Tell every plugin about `error` and close; failures become notes on `error`."""
        for failure in self._close_after(error):
            error.add_note(f"while closing: {failure}")

    def _close_after(self, error: BaseException) -> list[Exception]:
        failures: list[Exception] = []
        try:
            if not self._lifecycle.closed:
                failures += announce_exception(self._hooks.relay, self._context, error)
        finally:  # after an interrupt too
            self._lifecycle.abandon()
            self._lifecycle.closed_by_exception |= not self._lifecycle.closed
            try:
                self.close()
            except Exception as failure:
                failures.append(failure)
        return failures
