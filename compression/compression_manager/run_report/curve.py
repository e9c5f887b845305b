"""A number over the steps of a training, and how to draw fewer points of it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One number over time.

    Attributes:
        steps: optimizer steps completed, ascending.
        values: as many numbers; some may not be finite.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The newest value."""
        return self.values[-1]

    def finite(self) -> list[float]:
        """Return the values that are finite."""
        return [value for value in self.values if math.isfinite(value)]

    def recent_mean(self) -> float:
        """Return the mean over the last tenth of the points, at least one: steady where steps jump.

        NaN if one of them is not finite.
        """
        recent = self.values[-max(1, len(self.values) // 10) :]
        return math.fsum(recent) / len(recent) if all(map(math.isfinite, recent)) else math.nan


def thinned(curve: Curve, limit: int) -> Curve:
    """Return at most `limit` points (from 8) that look the same when drawn.

    Of each run of neighboring points the lowest, the highest and one that is not finite stay,
    and the first and last of all, so that spikes and gaps are kept.
    """
    count = len(curve.steps)
    if count <= limit:
        return curve
    buckets = max(1, (limit - 2) // 3)
    kept = {0, count - 1}
    for bucket in range(buckets):
        indices = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        numbers = [index for index in indices if math.isfinite(curve.values[index])]
        if numbers:
            kept.add(min(numbers, key=curve.values.__getitem__))
            kept.add(max(numbers, key=curve.values.__getitem__))
        if len(numbers) < len(indices):
            kept.add(next(i for i in indices if not math.isfinite(curve.values[i])))
    return _at(curve, sorted(kept))


def smoothed(curve: Curve, points: int) -> Curve:
    """Return the means of `points` runs of neighboring values, each at its middle step.

    A run in which a value is not finite has no mean and is left out.
    """
    count = len(curve.steps)
    steps, values = [], []
    for index in range(points):
        start, end = index * count // points, (index + 1) * count // points
        part = curve.values[start:end]
        if part and all(map(math.isfinite, part)):
            steps.append(curve.steps[(start + end - 1) // 2])
            values.append(math.fsum(part) / len(part))
    return Curve(tuple(steps), tuple(values))


def _at(curve: Curve, indices: list[int]) -> Curve:
    return Curve(
        tuple(curve.steps[index] for index in indices),
        tuple(curve.values[index] for index in indices),
    )
