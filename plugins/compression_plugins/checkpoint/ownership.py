"""Which training saves to a folder."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from pathlib import Path

from compression_manager.errors import CheckpointError
from compression_manager.state.files import exclusive, writing


class Ownership:
    """Keeps other trainings from saving to a folder; whoever reads it is not kept out.

    A process that ends gives it up, however it ends.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: AbstractContextManager[None] | None = None

    def take(self, plugin: str) -> None:
        """Take the folder, created if need be, for a plugin; nothing if it is taken already.

        Raises:
            CheckpointError: another training has it, or it cannot be created.
        """
        if self._held is not None:
            return
        with writing(self._root):
            try:
                self._held = _entered(self._root)
            except BlockingIOError:
                raise CheckpointError(
                    f"plugin '{plugin}': another training saves to {self._root} now, in "
                    "another process or by a manager of this one that was not closed. Give every "
                    "run, and every rank, a folder of its own; or end the other one first, with "
                    "on_train_end() or close()."
                ) from None

    def give_up(self) -> None:
        """Let others save there; a folder that was created for nothing is removed again."""
        held, self._held = self._held, None
        if held is not None:
            held.__exit__(None, None, None)


def _entered(root: Path) -> AbstractContextManager[None]:
    """Return what holds the folder from now on."""
    held = exclusive(root)
    try:
        held.__enter__()
    except BlockingIOError:
        # A notebook's cell that is run again drops its last manager without closing it.
        gc.collect()
        held = exclusive(root)
        held.__enter__()
    return held
