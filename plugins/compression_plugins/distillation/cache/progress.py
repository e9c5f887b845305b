"""The bar of a build."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compression_manager.progress_bar import ProgressBar
from compression_manager.tracking.batches import number_of_batches


def progress_bar(loader: Iterable[Any]) -> ProgressBar:
    """Return the batches of `loader` with a bar on stderr, which is shown only in a terminal."""
    return ProgressBar(
        loader,
        total=number_of_batches(loader),
        desc="caching the teacher",
        disable=None,
        dynamic_ncols=True,
        unit="batch",
    )
