"""Where the data loader of the present epoch stands, and how to get there again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from compression_manager.errors import CheckpointMismatchError, LifecycleError
from compression_manager.state import capture_random_state, restore_random_state
from compression_manager.tracking.batch_identity import identity_of
from compression_manager.tracking.tracked import Tracked, is_stateful

Batch = TypeVar("Batch")


class LoaderPosition:
    """Where the loader of the present epoch stands.

    A position in mid-epoch is restored by drawing the epoch's batches again from the random
    state of its start, dropping those that were consumed, and then restoring the random state
    of the save. A tracked loader that keeps its own state continues by itself. Whether the batches
    are the same again shows in the last one: `zip` and others begin with a loader before `start`
    can set the random state, and draw from generators that nobody sees.

    Args:
        tracked: its `dataloader` is the loader of loops that do not use `steps`.

    Attributes:
        consumed: batches of the coming epoch that an earlier run consumed.
        skipped: batches of the present epoch that were skipped for that reason.
        in_progress: whether `steps` has not come to the end of the present epoch's batches.
    """

    def __init__(self, tracked: Tracked) -> None:
        self.consumed = 0
        self.skipped = 0
        self.in_progress = False
        self._tracked = tracked
        self._loader: object = None
        self._last_batch: str | None = None
        self._starts_in_epoch = 0
        self._epoch_start: dict[str, Any] | None = None
        self._saved: dict[str, Any] | None = None
        self._generators_are_restored = False
        self._has_warned = False

    @property
    def must_start(self) -> bool:
        """Whether batches must be skipped by `steps(loader)` before the next step."""
        return self.consumed > 0

    def begin_epoch(self) -> None:
        """Forget the epoch before."""
        self.skipped = 0
        self.in_progress = False
        self._starts_in_epoch = 0
        self._epoch_start = None
        self._last_batch = None

    def start(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Return the loader's iterator, past the batches that an earlier run consumed.

        Raises:
            CheckpointMismatchError: the loader is not the one that was trained with.
        """
        self._loader = loader
        saved, self._saved = self._saved, None
        if saved is not None:
            _warn_of_persistent_workers(loader)
        if saved is not None and self.must_start:
            batches = self._skip(loader, saved)
        else:
            if saved is not None and not self._generators_are_restored:
                self._set_generators(saved["generators"])
            # Of several loops in one epoch, the number of steps does not tell which was left.
            self._epoch_start = None if self._starts_in_epoch else self._capture()
            batches = iter(loader)
        self._starts_in_epoch += 1
        self.in_progress = True
        return batches

    def passed_on(self, batch: object) -> None:
        """Remember the batch that training is about to get, before it may change it in place."""
        self._last_batch = identity_of(batch)

    def finish(self) -> None:
        """All batches of the epoch were consumed."""
        self.in_progress = False
        self._last_batch = None

    def restore_generators(self) -> None:
        """Set the generators of the tracked loader to their saved states, if it is known."""
        if self._saved is not None and self._generators_fit(self._saved["generators"]):
            self._set_generators(self._saved["generators"])
            self._generators_are_restored = True

    def check_restored(self) -> None:
        """Raise LifecycleError if a plain loop cannot continue with its next batch.

        Raises:
            LifecycleError: it must be written with `steps(loader)`, or track its loader.
        """
        if self.must_start:
            raise LifecycleError(
                "training was resumed in mid-epoch; write the loop as "
                "'for step, batch in manager.steps(loader):', which skips the "
                f"{self.consumed} batches that were consumed."
            )
        saved, restored = self._saved, self._generators_are_restored
        if saved is not None and saved["generators"] and not restored:
            raise LifecycleError(
                "the data loader has a generator of its own, whose state was saved; register it "
                "with manager.track(dataloader=loader) before on_train_begin, or write the loop "
                "as 'for step, batch in manager.steps(loader):'."
            )
        if saved is not None:
            _warn_of_persistent_workers(self._tracked.get("dataloader"))
        self._saved = None

    def state_dict(self) -> dict[str, Any]:
        """Return the random state of the epoch's start and the present one."""
        if self._saved is not None and (self.must_start or not self._generators_are_restored):
            return self._saved
        return {
            "epoch_start": self._epoch_start,
            "last_batch": self._last_batch,
            **self._capture(),
        }

    def warn_if_lost(self, state: Mapping[str, Any], *, consumed: int) -> None:
        """Tell, once, that `state`, which is saved now, will be refused by `check_state`.

        After the last batch of an epoch nothing is told: plain loops often save there, before
        they end the epoch, and save again behind it.
        """
        loader = self._tracked.get("dataloader")
        is_last = isinstance(loader, Sized) and consumed == len(loader)
        if not consumed or is_last or state["epoch_start"] is not None or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"a state is saved after {consumed} batches of an epoch that do not come from "
            "manager.steps(loader), so that no training can be resumed from it. Save at the ends "
            "of epochs (CheckpointConfig(save_every_epochs=1)), or write the loop as "
            "'for step, batch in manager.steps(loader):'.",
            stacklevel=4,
        )

    @staticmethod
    def check_state(state: Mapping[str, Any], *, consumed: int) -> None:
        """Raise CheckpointMismatchError if a position in mid-epoch cannot be found again."""
        if consumed and state["epoch_start"] is None:
            raise CheckpointMismatchError(
                "the checkpoint was saved in mid-epoch by a loop that does not go through "
                "manager.steps(loader) once per epoch, so the batches that follow are unknown; "
                "resume from a checkpoint of an epoch's end, or write the loop with "
                "manager.steps(loader)."
            )

    def load_state_dict(self, state: dict[str, Any], *, consumed: int) -> None:
        """Prepare `start`, or the first step of a loop that does not use it."""
        self.begin_epoch()
        self.consumed = consumed
        self._saved = state
        self._generators_are_restored = False

    def _skip(self, loader: Iterable[Batch], saved: Mapping[str, Any]) -> Iterator[Batch]:
        consumed, self.consumed = self.consumed, 0
        self.skipped = consumed
        self._epoch_start = saved["epoch_start"]
        tracked = self._tracked.get("dataloader")
        if is_stateful(tracked) and any(item is tracked for item in _loaders_in(loader)):
            batches: Iterator[Batch] = iter(loader)
        else:
            restore_random_state(saved["epoch_start"]["random"])
            self._set_generators(saved["epoch_start"]["generators"])
            batches = iter(loader)
            last = identity_of(_drop(batches, consumed))
            if saved.get("last_batch") not in (None, last) and not _is_persistent(loader):
                _warn_of_other_batches(loader)
        self._last_batch = saved.get("last_batch")
        self._set_generators(saved["generators"])
        restore_random_state(saved["random"])
        return batches

    def _capture(self) -> dict[str, Any]:
        return {
            "random": capture_random_state(),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def _generators(self) -> list[Any]:
        """Return the distinct torch generators that the loaders and their samplers draw from."""
        found = {}
        for loader in (*_loaders_in(self._loader), self._tracked.get("dataloader")):
            batch_sampler = getattr(loader, "batch_sampler", None)
            owners = (
                loader,
                getattr(loader, "sampler", None),
                batch_sampler,
                getattr(batch_sampler, "sampler", None),
            )
            for generator in (getattr(owner, "generator", None) for owner in owners):
                if generator is not None:
                    found[id(generator)] = generator
        return list(found.values())

    def _generators_fit(self, states: list[Any]) -> bool:
        return len(self._generators()) == len(states)

    def _set_generators(self, states: list[Any]) -> None:
        if not self._generators_fit(states):
            raise CheckpointMismatchError(
                f"the data loader draws from {len(self._generators())} generators of its own, the "
                f"checkpoint holds the states of {len(states)}; resume with the loader that was "
                "trained with."
            )
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)


def _loaders_in(loader: object) -> list[object]:
    """Return the loader, and those that it holds, as a progress bar does."""
    if isinstance(loader, DataLoader):
        return [loader]
    held = getattr(loader, "__dict__", {}).values()
    return [loader, *(value for value in held if isinstance(value, DataLoader))]


def _is_persistent(loader: object) -> bool:
    return any(getattr(item, "persistent_workers", False) for item in _loaders_in(loader))


def _warn_of_other_batches(loader: object) -> None:
    warnings.warn(
        "training was resumed in mid-epoch, but the batches that were skipped are not those that "
        "it had consumed, so that some samples come twice and others not at all. steps got "
        f"{type(loader).__name__}; give it the data loader itself rather than what zip or islice "
        "makes of it, register the loader with manager.track(dataloader=loader), and let data sets "
        "draw random numbers from torch, numpy or random.",
        stacklevel=5,
    )


def _warn_of_persistent_workers(loader: object) -> None:
    if _is_persistent(loader):
        warnings.warn(
            "the data loader's persistent workers keep random states of their own, which no "
            "checkpoint holds: if the data set draws random numbers, the resumed run draws others. "
            "With persistent_workers=False it draws the same.",
            stacklevel=5,
        )


def _drop(batches: Iterator[object], count: int) -> object:
    """Skip `count` batches, at least one, and return the last."""
    batch = _END
    for dropped in range(count):
        batch = next(batches, _END)
        if batch is _END:
            raise CheckpointMismatchError(
                f"the checkpoint was saved after {count} batches of an epoch, but the data "
                f"loader ended after {dropped}; resume with the loader that was trained with."
            )
    return batch


_END = object()
