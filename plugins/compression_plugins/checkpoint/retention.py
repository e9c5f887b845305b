"""Which checkpoints stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Saved:
    """One checkpoint on disk.

    Attributes:
        name: its directory inside the plugin's folder.
        epoch: the epoch in which it was saved.
        global_step: optimizer steps completed when it was saved.
        metric: the watched metric of that epoch's evaluation, or None.
    """

    name: str
    epoch: int
    global_step: int
    metric: float | None


def ranked(saved: Sequence[Saved], *, lower_is_better: bool) -> list[Saved]:
    """Return the checkpoints that have a metric, best first; of equals, the older first.

    NaN is no metric.
    """
    sign = 1.0 if lower_is_better else -1.0
    candidates = [(item.metric, item) for item in saved if item.metric is not None]
    numbers = [(value, item) for value, item in candidates if not math.isnan(value)]
    return [item for _, item in sorted(numbers, key=lambda pair: sign * pair[0])]


def kept(
    saved: Sequence[Saved], *, keep_last: int, keep_best_n: int, lower_is_better: bool
) -> list[Saved]:
    """Return those of `saved` (oldest first) that stay, in the same order."""
    best = ranked(saved, lower_is_better=lower_is_better)[:keep_best_n]
    names = {item.name for item in (*saved[-keep_last:], *best)}
    return [item for item in saved if item.name in names]
