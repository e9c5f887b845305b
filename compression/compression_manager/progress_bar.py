"""A bar for long work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    _Base = tqdm[Any]
else:
    _Base = tqdm


class ProgressBar(_Base):
    """tqdm's, without the thread that redraws slow bars, which would outlive the work."""

    monitor_interval = 0
