"""The shorter loop: generators that fire the paired events around the user's body."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from compression_manager.errors import CheckpointMismatchError, ConfigError
from compression_manager.state import capture_random_state, restore_random_state

if TYPE_CHECKING:
    from types import FrameType

    from compression_manager.manager import CompressionManager

Batch = TypeVar("Batch")

# The instructions with which CPython drops a loop's iterator when the loop is left by break,
# by return or because it is exhausted. Any other instruction means that the body raised.
_ORDERLY_EXITS = frozenset({"POP_TOP", "POP_ITER", "END_FOR"})
_SUSPENDED = frozenset({"YIELD_VALUE", "RESUME"})


def run_epochs(manager: CompressionManager, first: int, total: int) -> Iterator[int]:
    """Yield epoch numbers; fires train and epoch begin and end."""
    manager.on_train_begin()
    for epoch in range(first, total):
        if manager.should_stop:
            break
        manager.on_epoch_begin(epoch)
        try:
            yield epoch
        except GeneratorExit:
            if _left_by_exception(sys._getframe().f_back):
                manager.loop_raised()
            else:
                manager.loop_left(manager.on_epoch_end, manager.on_train_end)
            return
        manager.on_epoch_end()
    manager.on_train_end()


def run_steps(
    manager: CompressionManager, position: LoaderPosition, loader: Iterable[Batch]
) -> Iterator[tuple[int, Batch]]:
    """Yield (step, batch); fires step begin and end."""
    consumed = position.consumed
    batches = position.start(loader)
    empty = consumed == 0
    for step, batch in enumerate(batches, start=consumed):
        empty = False
        manager.on_step_begin(step)
        try:
            yield step, batch
        except GeneratorExit:
            if _left_by_exception(sys._getframe().f_back):
                manager.loop_raised()
            else:
                manager.loop_left(manager.on_step_end)
            return
        manager.on_step_end()
    if empty:
        raise ConfigError(
            f"the data loader ({type(loader).__name__}) yielded no batch; check the data set's "
            "size, batch_size and drop_last."
        )


class LoaderPosition:
    """Where the loader of the present epoch stands.

    A position in mid-epoch is restored by drawing the epoch's batches again from the random
    state of its start, dropping those that were consumed, and then restoring the random state
    of the save.

    Attributes:
        consumed: batches of the coming epoch that an earlier run consumed.
        skipped: batches of the present epoch that were skipped for that reason.
    """

    def __init__(self) -> None:
        self.consumed = 0
        self.skipped = 0
        self._epoch_start: dict[str, Any] | None = None
        self._saved: dict[str, Any] | None = None
        self._loader: object = None

    @property
    def must_start(self) -> bool:
        """Whether batches must be skipped by `steps(loader)` before the next step."""
        return self.consumed > 0

    def start(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Return the loader's iterator, past the batches that an earlier run consumed."""
        consumed, self.consumed = self.consumed, 0
        self.skipped = consumed
        saved, self._saved = self._saved, None
        self._loader = loader
        if saved is not None:
            _set_generators(loader, saved["generators"])
        if not consumed or saved is None:
            self._epoch_start = _capture(loader)
            return iter(loader)
        self._epoch_start = saved["epoch_start"]
        restore_random_state(saved["epoch_start"]["random"])
        _set_generators(loader, saved["epoch_start"]["generators"])
        batches = iter(loader)
        for skipped in range(consumed):
            if next(batches, _END) is _END:
                raise CheckpointMismatchError(
                    f"the checkpoint was saved after {consumed} batches of an epoch, but the data "
                    f"loader ended after {skipped}; resume with the loader that was trained with."
                )
        restore_random_state(saved["random"])
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Return the random state of the epoch's start and the present one."""
        return {"epoch_start": self._epoch_start, **_capture(self._loader)}

    def load_state_dict(self, state: dict[str, Any], *, consumed: int, loader: object) -> None:
        """Prepare `start`; `loader` is the tracked dataloader, or None.

        Raises:
            CheckpointMismatchError: a position in mid-epoch was saved outside of `steps`.
        """
        if consumed and state["epoch_start"] is None:
            raise CheckpointMismatchError(
                "the checkpoint was saved in mid-epoch by a loop that does not use "
                "manager.steps(loader), so the batches that follow are unknown; resume from a "
                "checkpoint of an epoch's end, or write the loop with manager.steps(loader)."
            )
        self.consumed = consumed
        self._saved = state
        self._epoch_start = None
        _set_generators(loader, state["generators"])


_END = object()


def _generators(loader: object) -> list[Any]:
    """Return the distinct torch generators that a DataLoader and its sampler draw from."""
    owners = (loader, getattr(loader, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(item): item for item in found if item is not None}.values())


def _set_generators(loader: object, states: list[Any]) -> None:
    for generator, saved in zip(_generators(loader), states, strict=False):
        generator.set_state(saved)


def _capture(loader: object) -> dict[str, Any]:
    return {
        "random": capture_random_state(),
        "generators": [generator.get_state() for generator in _generators(loader)],
    }


def _left_by_exception(frame: FrameType | None) -> bool:
    """Return whether the loop that drops this generator does so because its body raised.

    Python tells a generator that it is dropped, but not why; the instruction at which the
    loop's frame stands does. Frames of generators in between (tqdm, for example) stand at
    their yield, because they are being dropped themselves.
    """
    while frame is not None:
        instruction = _present_instruction(frame)
        if instruction not in _SUSPENDED:
            return instruction not in _ORDERLY_EXITS
        frame = frame.f_back
    return False


def _present_instruction(frame: FrameType) -> str | None:
    instructions = dis.get_instructions(frame.f_code)
    return next((item.opname for item in instructions if item.offset == frame.f_lasti), None)
