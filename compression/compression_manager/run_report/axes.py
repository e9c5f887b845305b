"""From numbers to places in a drawing: scales, ticks and paths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compression_manager.run_report.curve import Curve

# Above it, equal factors deserve equal distances.
_LOG_FROM = 50.0
# Beyond these, differences and quotients of numbers are no longer exact.
_LARGEST, _SMALLEST = 1e300, 1e-290


@dataclass(frozen=True)
class Axis:
    """A range of numbers along a length.

    Attributes:
        low: number at `start`.
        high: number at `end`.
        start: pixel of `low`.
        end: pixel of `high`; smaller than `start` for an axis that points upwards.
        is_log: whether equal factors have equal lengths.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a number."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return about so many round numbers within the range, ascending."""
        if self.is_log:
            return _log_ticks(self.low, self.high, count)
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def value_axis(values: Sequence[float], start: float, end: float, *, may_be_log: bool) -> Axis:
    """Return an axis that holds all values, with some room; logarithmic if they span decades."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if may_be_log and low > 0 and high / low >= _LOG_FROM:
        return Axis(low / 1.15, high * 1.15, start, end, is_log=True)
    low, high = max(low, -_LARGEST), min(high, _LARGEST)
    room = (high - low) * 0.06
    if room < _SMALLEST:  # a constant still needs an extent
        room = abs(high) * 0.1 if abs(high) > _SMALLEST else 1.0
    return Axis(low - room, high + room, start, end)


def step_axis(curves: Iterable[Curve], start: float, end: float) -> Axis:
    """Return an axis from the first to the last step of all curves."""
    steps = [step for curve in curves for step in (*curve.steps[:1], *curve.steps[-1:])]
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    return Axis(low, high if high > low else low + 1, start, end)


def path(curve: Curve, x: Axis, y: Axis) -> str:
    """Return the `d` of an SVG path that is interrupted where a value is not finite."""
    parts = []
    pen_down = False
    for step, value in zip(curve.steps, curve.values, strict=True):
        drawn = math.isfinite(value)
        if drawn:
            parts.append(f"{'L' if pen_down else 'M'}{x.place(step):.1f} {y.place(value):.1f}")
        pen_down = drawn
    return "".join(parts)


def _round_step(rough: float) -> float:
    """Return 1, 2 or 5 times a power of ten, nearly `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if rough <= factor * power * 1.0001)


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, len(decades) // count)
    factors = (1, 2, 5) if len(decades) <= 3 else (1, 3) if len(decades) <= 5 else (1,)
    found = [factor * 10.0**decade for decade in decades[::stride] for factor in factors]
    return [value for value in found if low <= value <= high]
