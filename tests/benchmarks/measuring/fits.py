"""How a cost grows: straight lines through measured points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


def exponent(costs: Mapping[int, float]) -> float:
    """Return p of the power law cost ~ size**p through the points (1: linear)."""
    sizes = [math.log(size) for size in costs]
    return statistics.linear_regression(sizes, [math.log(cost) for cost in costs.values()]).slope


def last_exponent(costs: Mapping[int, float]) -> float:
    """Return the same between the two largest sizes, where fixed costs hide least."""
    return exponent({size: costs[size] for size in sorted(costs)[-2:]})


def relative_growth(positions: Sequence[float], values: Sequence[float]) -> float:
    """Return by what part the fitted line rises from the first position to the last (0: flat)."""
    line = statistics.linear_regression(positions, values)
    first = line.intercept + line.slope * positions[0]
    return line.slope * (positions[-1] - positions[0]) / first
