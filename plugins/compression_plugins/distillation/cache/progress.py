"""The bar of a build."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from compression_manager.batches import number_of_batches

if TYPE_CHECKING:
    _BarBase = tqdm[Any]
else:
    _BarBase = tqdm


class _Bar(_BarBase):
    # Otherwise tqdm starts a thread that redraws slow bars.
    monitor_interval = 0


def progress_bar(loader: Iterable[Any]) -> _Bar:
    """Return the batches of `loader` with a bar on stderr, which is shown only in a terminal."""
    return _Bar(
        loader,
        total=number_of_batches(loader, None),
        desc="caching the teacher",
        disable=None,
        dynamic_ncols=True,
        unit="batch",
    )
