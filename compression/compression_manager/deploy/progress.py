"""Which step of something long is running, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compression_manager.progress_bar import ProgressBar


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that is told the name of each step before it begins.

    A terminal shows a bar; without one, a line says that the work begins.

    Args:
        title: what is done.
        total: number of steps.
    """
    bar = ProgressBar(
        total=total,
        desc=title,
        disable=None,
        file=sys.stderr,
        dynamic_ncols=True,
        bar_format="{desc}: {n_fmt}/{total_fmt}{postfix} [{elapsed}]",
    )
    if bar.disable:
        print(f"{title} ...", file=sys.stderr, flush=True)

    def begin(step: str) -> None:
        bar.set_postfix_str(step, refresh=False)
        bar.update()
        bar.refresh()

    with bar:
        yield begin
