"""Undo callbacks that all run, whatever one of them raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compression_manager.errors import CompressionError, PluginError


class ClosingErrors(ExceptionGroup[Exception], CompressionError):
    """Several plugins failed while closing; every one of them was closed."""

    def derive(self, excs: Sequence[Exception]) -> ClosingErrors:  # type: ignore[override]  # narrower, as the docs of ExceptionGroup advise
        """Return a group of the same kind, for `except*` and `split`."""
        return ClosingErrors(self.message, excs)


class Cleanup:
    """A stack of callbacks with their owners' names."""

    def __init__(self) -> None:
        self._callbacks: list[tuple[str, Callable[[], object]]] = []

    def add(self, callback: Callable[[], object], owner: str) -> None:
        """Put `callback` on the stack; `owner` is named if it fails."""
        self._callbacks.append((owner, callback))

    def run(self) -> list[BaseException]:
        """Run all callbacks, last added first, empty the stack and return what they raised.

        An interrupt (Ctrl-C, for example) is one of these: what is left has to be undone all the
        same.
        """
        failures: list[BaseException] = []
        while self._callbacks:
            owner, callback = self._callbacks.pop()
            try:
                callback()
            except Exception as error:
                failure = PluginError(
                    f"plugin '{owner}' failed while closing: {error}", plugin=owner, hook="close"
                )
                failure.__cause__ = error
                failures.append(failure)
            except BaseException as interrupt:
                failures.append(interrupt)
        return failures


def raise_failures(failures: Sequence[BaseException]) -> None:
    """Raise the only failure as it is, or several as a group; nothing for none.

    An interrupt is raised as it is, with the others as notes.
    """
    errors = [failure for failure in failures if isinstance(failure, Exception)]
    interrupts = [failure for failure in failures if not isinstance(failure, Exception)]
    if interrupts:
        first = min(interrupts, key=lambda item: not isinstance(item, KeyboardInterrupt))
        for error in errors:
            first.add_note(f"while closing: {error}")
        raise first
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ClosingErrors("several plugins failed", errors)
