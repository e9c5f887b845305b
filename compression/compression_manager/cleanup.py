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

    def run(self) -> list[Exception]:
        """Run all callbacks, last added first, empty the stack and return what they raised."""
        failures: list[Exception] = []
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
        return failures


def raise_failures(failures: list[Exception]) -> None:
    """Raise the only failure as it is, or several as a group; nothing for none."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ClosingErrors("several plugins failed", failures)
