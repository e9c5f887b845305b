"""What a training was like: plain numbers, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: its number, from 0.
        global_step: optimizer steps completed at its end, those of earlier epochs included.
        losses: mean over the epoch's steps of each loss term, unweighted, by its name (`task`,
            `distillation/KL`), and of their weighted sum (`total`), which is what was minimized.
        metrics: what was measured on the validation data at its end.
    """

    epoch: int
    global_step: int
    losses: Mapping[str, float]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrainingHistory:
    """What `KnowledgeDistillationTrainer.train` returns; `str()` of it is a table.

    Attributes:
        metric: name of the metric that decides which epoch is the best.
        lower_is_better: whether it improves downwards.
        initial_metrics: what was measured before the first step. It is never the best epoch.
        epochs: one entry per epoch, of a resumed training those before the interruption included.
        best_epoch: number of the epoch whose weights the student has now; None if the metric
            was NaN in all of them, so that the student has the weights of the last.
        stop_reason: why training ended early, in words; None if all epochs were trained.
    """

    metric: str
    lower_is_better: bool
    initial_metrics: Mapping[str, float]
    epochs: tuple[EpochRecord, ...]
    best_epoch: int | None
    stop_reason: str | None

    @property
    def best(self) -> EpochRecord | None:
        """The entry of the best epoch."""
        return next((item for item in self.epochs if item.epoch == self.best_epoch), None)

    def __str__(self) -> str:
        losses = _names(item.losses for item in self.epochs)
        metrics = _names([self.initial_metrics, *(item.metrics for item in self.epochs)])
        header = ["epoch", *(f"loss/{name}" for name in losses), *metrics]
        rows = [["start", *("" for _ in losses), *_row(self.initial_metrics, metrics)]]
        for item in self.epochs:
            mark = " *" if item.epoch == self.best_epoch else ""
            values = [*_row(item.losses, losses), *_row(item.metrics, metrics)]
            rows.append([f"{item.epoch}{mark}", *values])
        direction = "lower" if self.lower_is_better else "higher"
        best = "none" if self.best_epoch is None else f"epoch {self.best_epoch}"
        ending = [f"best (*): {best}, by {self.metric}, {direction} is better"]
        ending += [f"stopped early: {self.stop_reason}"] if self.stop_reason else []
        return "\n".join([*_aligned([header, *rows]), *ending])


def better(value: float, best: float | None, *, lower_is_better: bool) -> bool:
    """Return whether `value` beats `best`; NaN never does, and an equal value does not."""
    if math.isnan(value) or best is None:
        return not math.isnan(value)
    return value < best if lower_is_better else value > best


def _names(mappings: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _row(values: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [f"{values[name]:.4g}" if name in values else "" for name in names]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
