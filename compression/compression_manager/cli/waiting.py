"""A sign of life while something long is read."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from compression_manager.progress_bar import ProgressBar

_INTERVAL = 0.5


@contextmanager
def waiting(text: str, *, after: float = 2.0) -> Iterator[None]:
    """Show `text` and the time elapsed on stderr while the body runs, and remove it at the end.

    Nothing is shown unless stderr is a terminal, so that logs and pipes stay clean.

    Args:
        text: what is going on.
        after: seconds before anything is shown.
    """
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def show() -> None:
        if done.wait(after):
            return
        with ProgressBar(
            desc=text, bar_format="{desc}: {elapsed}", leave=False, file=sys.stderr
        ) as bar:
            while not done.wait(_INTERVAL):
                bar.refresh()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
